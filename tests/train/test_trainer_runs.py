"""The whole adaptation, and warm-up, under Hugging Face `Trainer` and TRL's `SFTTrainer`: the weights of our own loop.

The trainers are unchanged. They get the same rows in the same order, the same schedule and the same optimizer settings.
"""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen3MoeConfig, Trainer, TrainingArguments, default_data_collator

import tokensieve
from tests.support.models import ours
from tests.support.training import SMALL, Workplace, model, workplace
from tokensieve.config import LoraConfig, OptimizerConfig, PhaseConfig, TrainConfig, UserError
from tokensieve.model import DecoderForCausalLM
from tokensieve.train import Run, run
from tokensieve.train.lora import first_weights

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")
STEPS, ROWS, CLIP = 4, 4, 0.3  # steps, rows of a step in two micro-batches, and a norm that clips every step
LR = 1e-3
TARGETS = {"latent": ["q_b_proj", "kv_b_proj", "o_proj"], "grouped": ["q_proj", "v_proj", "o_proj", "down_proj"]}
# Largest difference of a weight; the weights move by up to 2.5e-3. Gradients differ by the order of their sums, which
# Adam enlarges where they are nearly zero: 8e-7 is measured.
TOLERANCE = 5e-6
FAMILIES = ["latent", "grouped"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return workplace(tmp_path_factory.mktemp("runs"))


def fresh(family: str, seed: int = 0) -> DecoderForCausalLM:
    if family == "latent":
        return model(seed=seed)
    heads = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    config = Qwen3MoeConfig(**SMALL, **heads, **experts) if family == "experts" else LlamaConfig(**SMALL, **heads)
    return tokensieve.sparsify(ours(config, seed), 16, 4, 16, seed=seed)


def settings(here: Workplace, name: str, stage: str = "adapt", **changes: Any) -> TrainConfig:
    optimizer = OptimizerConfig(lr=LR, clip=CLIP, indexer_clip=CLIP)
    return here.run(stage, name, PhaseConfig(STEPS, 48, ROWS, ROWS // 2), optimizer=optimizer, **changes)


@pytest.fixture(scope="module")
def data(here: Workplace) -> list[dict[str, Tensor]]:
    """The rows of our loop in its order: packed documents with positions of their own."""
    with Run(settings(here, "rows"), fresh("latent"), rehearse=False).prepared() as this:
        return [this.datasets[0][i] for i in range(STEPS * ROWS)]


def arguments(out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": ROWS // 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": LR,
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.95,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    } | changes


def hugging_face(out: Path, made: Any, data: list, kl: Any, **changes: Any) -> Trainer:
    return Trainer(
        made,
        TrainingArguments(**arguments(out, **changes)),
        train_dataset=data,
        data_collator=default_data_collator,
        callbacks=[kl],
    )


def trl(out: Path, made: Any, data: list, kl: Any, place: Path, lora: Any = None, **changes: Any) -> Trainer:
    sft, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    more = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return sft.SFTTrainer(
        made,
        sft.SFTConfig(**arguments(out, **more, **changes)),
        train_dataset=datasets.Dataset.from_list([{n: t.tolist() for n, t in row.items()} for row in data]),
        data_collator=default_data_collator,
        processing_class=tokensieve.load_tokenizer(place),
        peft_config=lora,
        callbacks=[kl],
    )


def apart(made: DecoderForCausalLM, expected: DecoderForCausalLM, base: DecoderForCausalLM) -> float:
    """Largest difference of a weight; every weight that our loop moved must have moved."""
    mine, theirs, before = (dict(m.named_parameters()) for m in (made, expected, base))
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], before[name]) == torch.equal(theirs[name], before[name]), name
    return max(float((mine[n] - theirs[n]).abs().max()) for n in mine)


def adapter_of(family: str) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[family], modules_to_save=["indexer"])


@pytest.mark.parametrize("family", [*FAMILIES, "experts"])
@pytest.mark.parametrize("trainer", ["transformers", "trl"])
@pytest.mark.parametrize("stage", ["adapt", "warmup"])
def test_the_weights_of_our_loop(
    stage: Any, trainer: str, family: str, here: Workplace, data: list, tmp_path: Path
) -> None:
    """Of experts too, whose balance loss TRL would add if the config named it."""
    expected = run(
        settings(here, stage, stage, out=str(tmp_path / "ours")), fresh(family), progress=False, rehearse=False
    )
    made = fresh(family)
    with tokensieve.training(made, stage, clip=CLIP) as kl:
        if trainer == "trl":
            trl(tmp_path, made, data, kl, here.root / "tokenizer").train()
        else:
            hugging_face(tmp_path, made, data, kl).train()
    assert apart(made, expected, fresh(family)) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_of_our_loop_by_lora(family: str, here: Workplace, data: list, tmp_path: Path) -> None:
    """peft_config given to SFTTrainer; PEFT's model given to Trainer. What they save is the same model.

    If the adapters begin with the same weights: of a seed PEFT makes others.
    """
    config = settings(here, "lora", lora=LoraConfig(4, targets=tuple(TARGETS[family])), out=str(tmp_path / "ours"))
    expected = run(config, fresh(family), progress=False, rehearse=False)
    base = fresh(family)
    for trainer in ("transformers", "trl"):
        made, out = fresh(family), tmp_path / trainer
        with tokensieve.training(made, "adapt", clip=CLIP) as kl:
            if trainer == "trl":
                this = trl(out, made, data, kl, here.root / "tokenizer", adapter_of(family), seed=config.seed)
            else:
                this = hugging_face(out, peft.get_peft_model(made, adapter_of(family)), data, kl)
            made.load_state_dict(dict(first_weights(made, config.seed)), strict=False)
            this.train()
        this.save_model(str(out / "saved"))
        again = peft.PeftModel.from_pretrained(fresh(family), out / "saved").merge_and_unload()
        assert apart(again, expected, base) < TOLERANCE, trainer
        assert apart(this.model.merge_and_unload(), expected, base) < TOLERANCE, trainer


@pytest.mark.parametrize("adapters", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_trainer_resumes(adapters: bool, data: list, tmp_path: Path) -> None:
    def trained(out: Path, seed: int, resume: str | None = None) -> Trainer:
        torch.manual_seed(seed)
        made = fresh("grouped")
        whole = peft.get_peft_model(made, adapter_of("grouped")) if adapters else made
        with tokensieve.training(whole, "adapt", clip=CLIP) as kl:
            this = hugging_face(out, whole, data, kl, save_strategy="steps", save_steps=2)
            this.train(resume_from_checkpoint=resume)
        return this

    straight = trained(tmp_path / "straight", 0)
    again = trained(tmp_path / "again", 1, str(tmp_path / "straight" / "checkpoint-2"))
    mine, theirs = straight.model.state_dict(), again.model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    straight.save_model(str(tmp_path / "saved"))
    if not adapters:
        saved = DecoderForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
        assert all(torch.equal(saved[n], mine[n]) for n in mine)


def test_the_documents_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of docs/training.md, as it is written but for the number of steps and the dtype of a CPU."""
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- run -->\n```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    datasets = pytest.importorskip("datasets")
    code = code.replace("max_steps=100", "max_steps=1, use_cpu=True, bf16=False, per_device_train_batch_size=1")
    exec(code, {"dataset": datasets.Dataset.from_list([{"text": "def f(x):\n    return x + 1\n" * 20}])})
    before, after = tokensieve.load("sparse").state_dict(), tokensieve.load("runs/merged").state_dict()
    moved = {n.rpartition("self_attn.")[2].split(".")[0] for n in after if not torch.equal(before[n], after[n])}
    assert moved == {"q_b_proj", "kv_b_proj", "o_proj", "indexer"}


def test_one_norm_for_all_is_another_run(here: Workplace, data: list, tmp_path: Path) -> None:
    """If the trainer clips, indexers and trunk share one norm: the weights differ, and two clippings are refused."""
    expected = run(settings(here, "joint", out=str(tmp_path / "ours")), fresh("latent"), progress=False, rehearse=False)
    made = fresh("latent")
    with tokensieve.training(made, "adapt") as kl:
        hugging_face(tmp_path, made, data, kl, max_grad_norm=CLIP).train()
    base = dict(fresh("latent").named_parameters())
    moved = max(float((x - base[name]).abs().max()) for name, x in expected.named_parameters())
    assert apart(made, expected, fresh("latent")) > 0.05 * moved
    with tokensieve.training(fresh("latent"), "adapt", clip=CLIP) as kl:
        with pytest.raises(UserError, match="max_grad_norm to 0"):
            kl.on_train_begin(TrainingArguments(**arguments(tmp_path, max_grad_norm=1.0)), None, None)
