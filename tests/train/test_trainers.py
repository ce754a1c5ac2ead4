"""The indexers' KL under our loop, Hugging Face Trainer and TRL's SFTTrainer: the same gradients, however the step is
cut up.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, default_data_collator

import tokensieve
from tests.support import models
from tests.support.training import OPTIMIZER, Still, apart, batch, cut, indexers, model, step_gradients, workplace
from tokensieve.config import PhaseConfig, TrainConfig, UserError
from tokensieve.model import DecoderForCausalLM, ForwardOptions, KLScale, Objective, with_options
from tokensieve.train.callbacks import KLCallback

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")
STEP = batch(8, 40)
OBJECTIVES = ["warmup", "adapt"]


def arguments(folder: Path, n: int = 1, **changes: Any) -> dict[str, Any]:
    made = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8 // n,
        "gradient_accumulation_steps": n,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "dataloader_pin_memory": False,
    }
    return made | changes


def rows(step: dict[str, Tensor], *names: str) -> list[dict[str, Tensor]]:
    return [{n: step[n][i] for n in names} for i in range(len(step["input_ids"]))]


def trained(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients of the first step, by name, and the first row of the log."""
    found: dict[str, Tensor] = {}
    made = trainer.model
    trainer.optimizer = Still([p for p in made.parameters() if p.requires_grad])
    trainer.train()
    kept = trainer.optimizer.optimizer.kept if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer.kept
    found = {n: kept[p] for n, p in made.named_parameters() if p in kept}
    return found, trainer.state.log_history[0]


class Prepared(NamedTuple):
    """A model within its `training` block, and the block's callback."""

    model: DecoderForCausalLM
    kl: KLCallback


def hugging_face(folder: Path, made: Prepared, n: int, data: list, **changes: Any) -> Trainer:
    return Trainer(
        made.model,
        TrainingArguments(**arguments(folder, n, **changes)),
        train_dataset=data,
        eval_dataset=data,
        data_collator=default_data_collator,
        callbacks=[made.kl],
    )


def trl(folder: Path, made: Prepared, n: int, ids: list[list[int]], place: Path, **changes: Any) -> Trainer:
    sft, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    return sft.SFTTrainer(
        made.model,
        sft.SFTConfig(**arguments(folder, n, max_length=None, **changes)),
        train_dataset=datasets.Dataset.from_list([{"input_ids": row} for row in ids]),
        processing_class=tokensieve.load_tokenizer(place),
        callbacks=[made.kl],
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("trainers")).root / "tokenizer"


@pytest.fixture(scope="module")
def ours() -> dict[str, tuple[dict[str, Tensor], dict[str, float]]]:
    """Our loop's gradients and figures, one micro-batch."""
    return {objective: loop_step(objective, 1) for objective in OBJECTIVES}


def loop_step(objective: str, n: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    free = OPTIMIZER.__class__(clip=1e9, indexer_clip=1e9)
    config = TrainConfig(objective, "", "", (PhaseConfig(1, 40, 8, 8 // n),), optimizer=free, device="cpu")
    return step_gradients(config, model(), cut(STEP, n))


@pytest.fixture
def prepared() -> Iterator[Callable[[str], Prepared]]:
    with ExitStack() as blocks:

        def prepare(objective: Any, seed: int = 0, **changes: Any) -> Prepared:
            made = model(seed=seed, **changes)
            return Prepared(made, blocks.enter_context(tokensieve.training(made, objective)))

        yield prepare


def by_queries(objective: Any, per_query: float) -> ForwardOptions:
    return ForwardOptions(objective=Objective(objective, KLScale(per_query=per_query)))


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("trainer", ["loop", "transformers", "trl"])
def test_equal_gradients(
    trainer: str, objective: str, n: int, ours: dict, tokenizer: Path, tmp_path: Path, prepared: Any
) -> None:
    expected, figures = ours[objective]
    if trainer == "loop":
        found, log = loop_step(objective, n)
        kl = log["kl"]
    else:
        if trainer == "trl":
            made = trl(tmp_path, prepared(objective), n, STEP["input_ids"].tolist(), tokenizer)
        else:
            made = hugging_face(tmp_path, prepared(objective), n, rows(STEP, "input_ids", "labels"))
        found, log = trained(made)
        kl = log["kl"]
        after = made.model.eval().model(STEP["input_ids"]).objective
        assert after.scale is None  # nothing of the trainer stays behind
        if objective == "adapt" or trainer == "transformers":
            assert log["loss"] == pytest.approx(figures["lm" if objective == "adapt" else "kl"], rel=1e-5)
    assert apart(indexers(found), indexers(expected)) < 1e-5
    assert kl == pytest.approx(figures["kl"], rel=1e-5)
    assert objective == "adapt" or found.keys() == indexers(found).keys()
    # The trunk's gradients are summed in another order, through another head: equal up to that.
    assert apart(found, expected) < 1e-3


def test_micro_batches_of_different_size(tmp_path: Path, prepared: Any) -> None:
    """Padding and a last step that is shorter than the others: still the mean over the step's valid queries."""
    mask = torch.ones(6, 40, dtype=torch.long)
    for row, kept in enumerate((40, 9, 33, 3, 21, 40)):
        mask[row, kept:] = 0
    data = {"input_ids": STEP["input_ids"][:6], "attention_mask": mask}
    data["labels"] = data["input_ids"].masked_fill(mask == 0, -100)
    for objective in OBJECTIVES:
        whole = prepared(objective).model.train()
        out = whole(**data, options=by_queries(objective, 1.0 / float(mask.sum())))
        out.loss.backward()
        expected = {n: p.grad for n, p in whole.named_parameters() if ".indexer." in n}
        made = hugging_face(
            tmp_path, prepared(objective), 8, rows(data, *data), gradient_accumulation_steps=8, num_train_epochs=1
        )
        found, log = trained(made)
        assert apart(indexers(found), expected) < 1e-5
        assert log["kl"] == pytest.approx(out.kl.item(), rel=1e-5)


def test_warmup_without_labels(ours: dict, tmp_path: Path, prepared: Any) -> None:
    """Then Trainer divides the loss itself; neither the gradient nor the logged loss may change."""
    found, log = trained(hugging_face(tmp_path, prepared("warmup"), 4, rows(STEP, "input_ids")))
    assert apart(found, ours["warmup"][0]) < 1e-5
    assert log["loss"] == pytest.approx(ours["warmup"][1]["kl"], rel=1e-5)


def test_padding_free_packing_in_trl(tokenizer: Path, tmp_path: Path, prepared: Any) -> None:
    """TRL packs documents into one row and sends position_ids, seq_idx and cumulative lengths."""
    lengths = (40, 17, 30, 9)
    ids = [row[:n] for row, n in zip(STEP["input_ids"].tolist(), lengths, strict=False)]
    made = trl(tmp_path, prepared("adapt"), 1, ids, tokenizer, padding_free=True, per_device_train_batch_size=4)
    found, _ = trained(made)
    whole, options = prepared("adapt").model.train(), by_queries("adapt", 1.0 / sum(lengths))
    for row in ids:
        whole(input_ids=torch.tensor([row]), options=options).logits.mul(0.0).sum().backward()
    expected = {n: p.grad for n, p in whole.named_parameters() if ".indexer." in n}
    assert apart(indexers(found), expected) < 1e-5


def test_evaluation_between_steps_changes_nothing(ours: dict, tmp_path: Path, prepared: Any) -> None:
    data = rows(STEP, "input_ids", "labels")
    for objective in OBJECTIVES:
        made = hugging_face(tmp_path, prepared(objective), 2, data, eval_strategy="steps", eval_steps=1)
        found, _ = trained(made)
        assert apart(indexers(found), indexers(ours[objective][0])) < 1e-5
        evaluated = next(row["eval_loss"] for row in made.state.log_history if "eval_loss" in row)
        assert evaluated == pytest.approx(ours[objective][1]["lm" if objective == "adapt" else "kl"], rel=1e-4)


# ---- refusals


def test_without_the_callback(tmp_path: Path, prepared: Any) -> None:
    for objective in OBJECTIVES:
        made = hugging_face(tmp_path, prepared(objective), 2, rows(STEP, "input_ids", "labels"))
        made.remove_callback(KLCallback)
        with pytest.raises(
            UserError, match=rf"{objective} under a Hugging Face trainer .* add what tokensieve.training"
        ):
            made.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fp16": True}, "bf16=True"),
        ({"torch_compile": True}, "torch_compile"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor to 0"),
        ({"_n_gpu": 2}, "torchrun"),
        ({"fsdp": True}, "has not sharded the whole model"),
        ({"deepspeed": "stage.json"}, "DeepSpeed"),
    ],
)
def test_what_cannot_be_exact_is_refused(changes: dict[str, Any], message: str, tmp_path: Path, prepared: Any) -> None:
    settings = TrainingArguments(**arguments(tmp_path))
    for name, value in changes.items():
        object.__setattr__(settings, name, value)
    made = prepared("adapt")
    with pytest.raises(UserError, match=message):
        made.kl.on_train_begin(settings, None, None, model=made.model)


def test_models_that_train_no_indexer_are_refused(tmp_path: Path, prepared: Any) -> None:
    settings = TrainingArguments(**arguments(tmp_path))
    for made, message in ((model("v3"), "this model has none; make it sparse"), (torch.nn.Linear(2, 2), "no model of")):
        with pytest.raises(UserError, match=message), tokensieve.training(made, "adapt"):
            raise AssertionError("not reached")
    frozen = prepared("adapt")
    for parameter in frozen.model.indexer_parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match="every indexer is frozen"):
        frozen.kl.on_train_begin(settings, None, None, model=frozen.model)
    with_auxiliary = prepared("adapt")
    with_auxiliary.model.config.output_router_logits = True  # as TRL sets it for experts
    with pytest.raises(UserError, match="router_aux_loss_coef to 0"):
        with_auxiliary.kl.on_train_begin(settings, None, None, model=with_auxiliary.model)
    with pytest.raises(UserError, match="the trainer's model is another one"):
        prepared("adapt").kl.on_train_begin(settings, None, None, model=model())


def test_an_inner_block_comes_first_and_restores_what_it_changed() -> None:
    made = model()
    made.requires_grad_(False)
    outer = with_options(made, ForwardOptions(objective=Objective("none")))
    with outer, tokensieve.training(made, "warmup"):
        assert made.train()(**STEP).kl is not None
        lora = peft.LoraConfig(target_modules=["q_b_proj"])  # renames the parameters
        peft.get_peft_model(made, lora)
    assert not any(x.requires_grad for name, x in made.named_parameters() if "lora_" not in name)


def test_two_forward_passes_before_a_backward_pass(tmp_path: Path, prepared: Any) -> None:
    made, callback = prepared("adapt")
    made.train()
    callback.on_train_begin(TrainingArguments(**arguments(tmp_path)), None, None, model=torch.nn.Sequential(made))
    with torch.no_grad():
        made(**STEP)
        made(**STEP)
    made(**STEP).loss.backward()
    made(**STEP)
    with pytest.raises(UserError, match="two forward passes"):
        made(**STEP)


# ---- checkpoints that trainers write


@pytest.mark.parametrize("shard_size", [None, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_trainer_saves_and_resumes(
    shard_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: Any
) -> None:
    """Its checkpoints have the published names, open with `load`, and resume where an uninterrupted run would be."""
    if shard_size is not None:
        whole = DecoderForCausalLM.save_pretrained
        monkeypatch.setattr(
            DecoderForCausalLM, "save_pretrained", lambda *a, **k: whole(*a, **(k | {"max_shard_size": shard_size}))
        )
    data = rows(STEP, "input_ids", "labels")
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    yarn = {"rope_parameters": models.YARN, "max_position_embeddings": 1024}  # what transformers cannot read by itself
    straight = hugging_face(tmp_path, prepared("adapt", **yarn), 1, data, **settings)
    straight.train()
    saved = tokensieve.load(tmp_path / "checkpoint-2")
    assert saved.config.rope_parameters["rope_theta"] == models.YARN["rope_theta"]
    assert len(list((tmp_path / "checkpoint-2").glob("model*.safetensors"))) in (
        [1] if shard_size is None else range(5, 40)
    )
    again = hugging_face(tmp_path, prepared("adapt", seed=5, **yarn), 1, data, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ours, theirs = again.model.state_dict(), straight.model.state_dict()
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert not all(torch.equal(saved.state_dict()[n], theirs[n]) for n in theirs)
    straight.save_model()  # beside the checkpoints of the run
    assert torch.equal(
        tokensieve.load(tmp_path)(STEP["input_ids"]).logits, straight.model.eval()(STEP["input_ids"]).logits
    )
    assert not list(tmp_path.glob(".saving*")) and (tmp_path / "checkpoint-3").is_dir()


def test_from_pretrained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = model()
    with caplog.at_level(logging.WARNING):
        made.save_pretrained(tmp_path)
    again = DecoderForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(STEP["input_ids"]).logits, made(STEP["input_ids"]).logits)
    assert DecoderForCausalLM.from_pretrained(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
    assert DecoderForCausalLM.from_pretrained(tmp_path, dtype="auto", device_map="auto").dtype == torch.float32
    tokensieve.save(made, tmp_path / "half", dtype=torch.bfloat16)
    assert DecoderForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    assert DecoderForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float32
    with pytest.raises(UserError, match="dtype 'bf17'"):
        DecoderForCausalLM.from_pretrained(tmp_path, dtype="bf17")
    with pytest.raises(UserError, match="push_to_hub"):
        made.save_pretrained(tmp_path, push_to_hub=True)
    made.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


# ---- several processes

TWO = """
import os
import sys
import torch
from pathlib import Path
from safetensors.torch import save_file
import tokensieve
from tests.support.training import model
from tests.train.test_trainers import STEP, Prepared, hugging_face, rows, trained
made = model()
block = tokensieve.training(made, sys.argv[2])
kl = block.__enter__()
data = {"input_ids": STEP["input_ids"], "labels": STEP["labels"], "attention_mask": torch.ones(8, 40, dtype=torch.long)}
data["attention_mask"][1, 9:] = 0
data["labels"][1, 9:] = -100
trainer = hugging_face(Path(sys.argv[1]), Prepared(made, kl), 2, rows(data, *data), per_device_train_batch_size=2)
found, log = trained(trainer)
if trainer.is_world_process_zero():
    file = Path(sys.argv[1]) / f"{trainer.args.world_size}.safetensors"
    save_file({n: g.contiguous() for n, g in found.items()}, file)
    print(log)
# gloo's threads may abort a process that ends in the ordinary way, even after its group
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes(objective: str, tmp_path: Path, prepared: Any) -> None:
    from safetensors.torch import load_file

    (tmp_path / "two.py").write_text(TWO)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, str(tmp_path / "two.py"), str(tmp_path), objective], env=environment, check=True)
    found = load_file(tmp_path / "2.safetensors")
    mask = torch.ones(8, 40, dtype=torch.long)
    mask[1, 9:] = 0
    whole = prepared(objective).model.train()
    labels = STEP["labels"].clone()
    labels[1, 9:] = -100
    whole(input_ids=STEP["input_ids"], attention_mask=mask, labels=labels).loss.backward()
    expected = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    assert apart(indexers(found), indexers(expected)) < 1e-5
    assert apart(found, expected) < 1e-3
