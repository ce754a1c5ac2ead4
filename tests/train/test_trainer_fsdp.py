"""The indexers' KL under Hugging Face's Trainer and TRL with accelerate's FSDP2 on two processes: the gradients,
figures and weights of one process.
"""

import json
import re
import runpy
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy

import tokensieve
from tests.support import grouped, models, ranks
from tests.support.training import apart, config, workplace
from tests.train import test_trainer_runs
from tests.train.test_trainers import OBJECTIVES, STEP, Prepared, by_queries, hugging_face, rows, trl
from tokensieve.config import UserError
from tokensieve.model import DecoderForCausalLM
from tokensieve.train.callbacks import sharded_model

TOLERANCE = 1e-5  # of the largest value of each gradient: float32 sums in another order; 5e-7 is measured
RUN = {
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 2,
    "train_sampling_strategy": "sequential",
    "learning_rate": 1e-3,
}
# as `accelerate launch` sets it
CONTEXT_PARALLEL = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}
POLICY = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
FAMILIES: dict[str, Any] = {
    "v32": lambda: config("v32"),
    "glm": lambda: config("glm", index_topk=16, num_hidden_layers=3, indexer_types=["full", "shared", "full"]),
    "tied": lambda: grouped.config("qwen3_moe_dsa", tie_word_embeddings=True),
}
LENGTHS = (40, 9, 33, 3, 21, 40, 17, 30)  # of the rows; two processes have two micro-batches of two rows


def ragged() -> dict[str, Tensor]:
    """Padded rows, so that micro-batches and processes hold different numbers of queries and labels."""
    mask = torch.ones(8, 40, dtype=torch.long)
    for row, kept in enumerate(LENGTHS):
        mask[row, kept:] = 0
    labels = STEP["labels"].masked_fill(mask == 0, -100)
    return {"input_ids": STEP["input_ids"], "attention_mask": mask, "labels": labels}


def whole_step(family: str, objective: Any) -> tuple[dict[str, Tensor], float, float]:
    """Gradients, loss and KL of all rows in one pass of one process."""
    made, data = models.ours(FAMILIES[family]()).train(), ragged()
    with tokensieve.training(made, objective):
        out = made(**data, options=by_queries(objective, 1.0 / float(data["attention_mask"].sum())))
        out.loss.backward()
    found = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
    return found, out.loss.item(), out.kl.item()


# in a rank's process


def sharding(patch: pytest.MonkeyPatch) -> None:
    """accelerate shards a model on CPUs too. By itself it does so on GPUs alone."""
    begin = PartialState.__init__

    def as_on_gpus(state: PartialState, cpu: bool = False, **more: Any) -> None:
        first = not PartialState._shared_state
        begin(state, True, **more)
        if first:
            state.distributed_type = DistributedType.MULTI_GPU

    patch.setattr(PartialState, "__init__", as_on_gpus)


def fsdp(**changes: Any) -> dict[str, Any]:
    """Arguments of a trainer whose model accelerate shards, from here on in this process."""
    if PartialState.__init__.__name__ != "as_on_gpus":
        sharding(pytest.MonkeyPatch())
    return {"fsdp": True, "fsdp_config": {"version": 2} | changes, "per_device_train_batch_size": 2}


def step_of_rank(
    folder: Path,
    family: str,
    objective: Any,
    place: Path | None = None,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The gradients and figures of a step; by TRL if there is a `place` with a tokenizer. bf16: by the policy."""
    made, data, found = models.ours(FAMILIES[family]()), ragged(), {}
    with tokensieve.training(made, objective) as kl:
        settings = fsdp(**options or {}) | changes
        if place is None:
            trainer = hugging_face(folder, Prepared(made, kl), 2, rows(data, *data), **settings)
        else:
            ids = [row[:length].tolist() for row, length in zip(data["input_ids"], LENGTHS, strict=True)]
            trainer = trl(folder, Prepared(made, kl), 2, ids, place, **settings)
        if changes.get("bf16"):
            trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = POLICY

        class Keeping(torch.optim.SGD):
            def step(self, closure: Any = None) -> None:
                for name, parameter in trainer.model.named_parameters():
                    if parameter.grad is not None:
                        found[name.replace("_checkpoint_wrapped_module.", "")] = parameter.grad.full_tensor().numpy()

        trainer.optimizer = Keeping([p for p in made.parameters() if p.requires_grad], lr=0.0)
        trainer.train()
    assert all(parameter.requires_grad for parameter in made.parameters())  # as before the block
    return found, trainer.state.log_history[0]


def run_of_rank(folder: Path, family: str, objective: Any, seed: int, resume: str | None, saved: Path) -> str:
    """A run of three steps whose model the trainer saves; what `tokensieve.save` says about it."""
    made, data = models.ours(FAMILIES[family](), seed), ragged()
    with tokensieve.training(made, objective, clip=0.3) as kl:
        trainer = hugging_face(folder, Prepared(made, kl), 2, rows(data, *data), **fsdp(), **RUN)
        trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(saved))
    try:
        tokensieve.save(made, saved)
    except UserError as error:
        return str(error)
    return "saved"


def adapted(folder: Path, place: Path, **changes: Any) -> None:
    """Two steps of TRL with PEFT's adapters, which the trainer saves."""
    made, data = models.ours(FAMILIES["v32"]()), ragged()
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_b_proj", "o_proj"], modules_to_save=["indexer"])
    with tokensieve.training(made, "adapt", clip=0.3) as kl:
        settings = {"max_steps": 2, "per_device_train_batch_size": 4} | changes
        trainer = test_trainer_runs.trl(folder, made, rows(data, *data), kl, place, lora, **settings)
        trainer.train()
    trainer.save_model(str(folder / "adapter"))


def adapted_of_rank(folder: Path, place: Path) -> None:
    adapted(folder, place, **fsdp())


def version_1_of_rank() -> str:
    made = FullyShardedDataParallel(models.ours(FAMILIES["v32"]()), device_id=torch.device("cpu"))
    try:
        sharded_model(made, True)
    except UserError as error:
        return str(error)
    return "nothing"


def launched(command: list[str]) -> None:
    """What each process of `accelerate launch` does, with the settings that its launcher takes from the command."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser, prepare_multi_gpu_env

    given, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    taken = {n: x for n, x in prepare_multi_gpu_env(given).items() if n.startswith(("ACCELERATE_", "FSDP_"))}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in taken.items():
            patch.setenv(name, value)
        patch.setattr("sys.argv", [given.training_script, *given.training_script_args])
        patch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
        fsdp()
        runpy.run_path(given.training_script, run_name="__main__")


def refusal_of_rank(folder: Path, options: dict[str, Any], changes: dict[str, Any], environment: dict[str, str]) -> str:
    made, data = models.ours(FAMILIES["v32"]()), ragged()
    with pytest.MonkeyPatch.context() as patch, tokensieve.training(made, "adapt") as kl:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            hugging_face(folder, Prepared(made, kl), 2, rows(data, *data), **fsdp(**options), **changes).train()
        except UserError as error:
            return str(error)
    return "nothing"


# here


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workplace(tmp_path_factory.mktemp("trainers")).root / "tokenizer"


def check_step(answers: list[Any], family: str, objective: str) -> None:
    expected, loss, kl = whole_step(family, objective)
    for answer, log in answers:
        assert apart({name: torch.from_numpy(x) for name, x in answer.items()}, expected) < TOLERANCE
        assert log["kl"] == pytest.approx(kl, rel=1e-5)
        assert log["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(("family", "objective"), [("v32", "adapt"), ("tied", "warmup")])
def test_a_step(two: ranks.Group, family: str, objective: str, tmp_path: Path) -> None:
    check_step(two.ask(step_of_rank, tmp_path, family, objective), family, objective)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"activation_checkpointing": True}, {"reshard_after_forward": False}, {"auto_wrap_policy": "NO_WRAP"}],
)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(two: ranks.Group, family: str, objective: str, options: dict[str, Any], tmp_path: Path) -> None:
    check_step(two.ask(step_of_rank, tmp_path, family, objective, None, options), family, objective)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", ["v32", "glm"])
def test_trl(two: ranks.Group, family: str, objective: str, tokenizer: Path, tmp_path: Path) -> None:
    check_step(two.ask(step_of_rank, tmp_path, family, objective, tokenizer), family, objective)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bfloat16(two: ranks.Group, objective: str, tmp_path: Path) -> None:
    """As far from float32 as autocast in one process is."""
    expected, loss, kl = whole_step("v32", objective)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _, _ = whole_step("v32", objective)
    for answer, log in two.ask(partial(step_of_rank, bf16=True), tmp_path, "v32", objective):
        found = {name: torch.from_numpy(x) for name, x in answer.items()}
        assert apart(found, expected) < 1.2 * apart(rounded, expected)
        assert log["kl"] == pytest.approx(kl, rel=1e-2) and log["loss"] == pytest.approx(loss, rel=1e-2)


def trained_alone(folder: Path, family: str, objective: Any) -> DecoderForCausalLM:
    """The run of `run_of_rank` in one process: the rows of both ranks in micro-batches of four."""
    made, data = models.ours(FAMILIES[family]()), ragged()
    with tokensieve.training(made, objective, clip=0.3) as kl:
        hugging_face(folder, Prepared(made, kl), 2, rows(data, *data), **RUN).train()
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("family", "objective"), [("v32", "adapt"), ("tied", "warmup"), ("tied", "adapt")])
def test_a_run_is_saved_and_resumed(two: ranks.Group, family: str, objective: str, tmp_path: Path) -> None:
    """Its folders open with `load`; resumed, it ends in the same weights to the bit; one process ends in them too."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    for said in two.ask(run_of_rank, tmp_path, family, objective, 0, None, whole):
        assert said.startswith("the model is sharded over ranks; ")
    two.ask(run_of_rank, tmp_path / "other", family, objective, 5, str(tmp_path / "checkpoint-2"), again)
    expected, resumed = (tokensieve.load(folder).state_dict() for folder in (whole, again))
    assert expected.keys() == resumed.keys() and all(torch.equal(expected[n], resumed[n]) for n in expected)
    between = tokensieve.load(tmp_path / "checkpoint-2").state_dict()
    assert not all(torch.equal(expected[n], between[n]) for n in expected)
    alone = trained_alone(tmp_path / "alone", family, objective).state_dict()
    assert max(float((expected[n] - alone[n]).abs().max()) for n in expected) < test_trainer_runs.TOLERANCE


@pytest.mark.slow
def test_adapters(two: ranks.Group, tokenizer: Path, tmp_path: Path) -> None:
    two.ask(adapted_of_rank, tmp_path / "two", tokenizer)
    adapted(tmp_path / "one", tokenizer)
    found, expected = (
        peft.PeftModel.from_pretrained(models.ours(FAMILIES["v32"]()), tmp_path / name / "adapter").merge_and_unload()
        for name in ("two", "one")
    )
    base = models.ours(FAMILIES["v32"]())
    assert test_trainer_runs.apart(found, expected, base) < test_trainer_runs.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "changes", "environment", "words"),
    [
        ({"cpu_ram_efficient_loading": True}, {}, {}, "set fsdp_cpu_ram_efficient_loading to false"),
        ({}, {"bf16": True}, {}, "cast_forward_inputs=False"),
        ({}, {}, CONTEXT_PARALLEL, "parallelism_config is not supported"),
    ],
)
def test_refusals(
    two: ranks.Group,
    options: dict[str, Any],
    changes: dict[str, Any],
    environment: dict[str, str],
    words: str,
    tmp_path: Path,
) -> None:
    for said in two.ask(refusal_of_rank, tmp_path, options, changes, environment):
        assert words in said and "\n" not in said


@pytest.mark.slow
def test_version_1_is_refused(two: ranks.Group) -> None:
    for said in two.ask(version_1_of_rank):
        assert said == "KLCallback: FSDP's version 1 is not supported; set fsdp_version to 2"


@pytest.mark.slow
def test_the_documented_command(two: ranks.Group, tmp_path: Path) -> None:
    """That of docs/training.md on a tiny model, begun, resumed, and opened."""
    root = Path(__file__).parents[2]
    text = (root / "docs" / "training.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = re.findall(r"^\$ accelerate launch (.*)$", text, re.MULTILINE)
    place = workplace(tmp_path / "place").root
    texts = [path.read_text(encoding="utf-8") for path in sorted((place / "text").iterdir())]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in texts), encoding="utf-8")
    given = {"--model": place / "sparse", "--data": tmp_path / "texts.jsonl", "--out": tmp_path / "out"}
    words = [str(root / word) if word.startswith("integrations/") else word for word in shlex.split(line)]
    for name, value in given.items():
        words[words.index(name) + 1] = str(value)
    short = ["--length", "48", "--micro-batches", "2", "--save-every", "2", "--lr", "1e-3"]
    two.ask(launched, ["--num_processes", "2", *words, *short, "--steps", "2"])
    two.ask(launched, ["--num_processes", "2", *words, *short, "--steps", "3", "--resume"])
    before, after = (tokensieve.load(folder).state_dict() for folder in (place / "sparse", tmp_path / "out"))
    rows_of_log = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in rows_of_log if "kl" in row] == [1, 2, 3]
    assert all(not torch.equal(before[n], after[n]) for n in before if n.endswith("weight") and "norm" not in n)
