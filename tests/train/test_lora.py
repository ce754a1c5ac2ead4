"""Adaptation by LoRA: what learns, what is written, resuming, and refusals."""

import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

import tokensieve
from tests.support.commands import Run as Command
from tests.support.commands import make_home, refusal, tiny
from tests.support.models import difference, ours
from tests.support.training import OPTIMIZER, SMALL, Workplace, batch, model, workplace
from tokensieve import cost
from tokensieve.config import LoraConfig, PhaseConfig, TrainConfig, UserError
from tokensieve.files import MERGED
from tokensieve.train import Interrupted, history, lora, run
from tokensieve.train.learning import learning
from tokensieve.train.loop import STAGES
from tokensieve.train.stage import StepTotals, backward, options_of
from tokensieve.train.starting import make_optimizer
from tokensieve.train.state import checkpoints

LORA = LoraConfig(rank=4)
MEASURED = {"seconds", "tokens_per_second"}
EXPERTS = ("kv_b_proj", "experts.gate_up_proj", "experts.down_proj")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    made = workplace(tmp_path_factory.mktemp("lora"))
    grouped = ours(LlamaConfig(**SMALL, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2))
    grouped.folder = made.root / "tokenizer"
    tokensieve.save(tokensieve.sparsify(grouped, 16, 4, 16), made.root / "grouped")
    return made


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return dict(tokensieve.load(folder).state_dict())


def learned(base: dict[str, Tensor], adapter: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights that an adapter's file stands for: W + scale * B A, and the indexers as they are in it."""
    weights = {name: tensor.clone() for name, tensor in base.items()}
    for name, tensor in adapter.items():
        name = name.removeprefix("base_model.model.")
        if name.endswith(".lora_A.weight"):
            B = adapter[f"base_model.model.{name.replace('lora_A', 'lora_B')}"]
            weights[name.replace(".lora_A", "")] += scale * B @ tensor
        elif ".lora_" not in name:
            weights[name] = tensor
    return weights


@pytest.mark.parametrize("family", ["sparse", "grouped"])
def test_adapters_and_indexers_learn(family: str, here: Workplace) -> None:
    """The adapter's file is all that was learned, and merged/ is the model that is returned."""
    settings = here.run("adapt", f"learns-{family}", model=str(here.root / family), lora=LORA)
    made = run(settings, progress=False, rehearse=False)
    base, out = tensors_of(here.root / family), Path(settings.out)
    (last,) = checkpoints(out)
    assert not list(last.glob("model*")) and (last / "adapter_config.json").is_file()
    adapter = load_file(last / lora.TENSORS)
    layers = {n.rpartition(".lora_A")[0].removeprefix("base_model.model.") for n in adapter if ".lora_A." in n}
    linear = {n for n, m in made.model.named_modules(prefix="model") if isinstance(m, torch.nn.Linear)}
    assert layers == {n for n in linear if ".indexer." not in n}
    expected = learned(base, adapter, 2.0)
    merged = tensors_of(out / MERGED)
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert difference(tensor, expected[name]) < 1e-6, name
        moves = ".indexer." in name or name.removesuffix(".weight") in layers
        assert torch.equal(tensor, base[name]) != moves or "k_norm" in name, name
    ids = batch(1, 60)["input_ids"]
    assert torch.equal(tokensieve.load(out / MERGED)(ids).logits, made(ids).logits)
    assert (out / MERGED / "tokenizer.json").is_file()
    losses = [row["lm"] for row in history(out)]
    assert losses[-1] < losses[0] - 0.1


def test_experts_learn_through_their_tensors(here: Workplace) -> None:
    settings = here.run("adapt", "experts", lora=replace(LORA, targets=EXPERTS, alpha=8))
    run(settings, progress=False, rehearse=False)
    base, merged = tensors_of(here.root / "sparse"), tensors_of(Path(settings.out) / MERGED)
    moved = {n.rpartition(".mlp.")[2] or n for n in merged if not torch.equal(merged[n], base[n])}
    moved = {n for n in moved if ".indexer." not in n}
    assert {n.rpartition("self_attn.")[2] for n in moved} == {
        "kv_b_proj.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
    }


def test_without_selection_the_indexers_stay(here: Workplace) -> None:
    settings = here.run("adapt", "dense", lora=LORA, selection=False)
    run(settings, progress=False, rehearse=False)
    base, merged = tensors_of(here.root / "sparse"), tensors_of(Path(settings.out) / MERGED)
    assert all(
        torch.equal(merged[n], base[n]) == (".indexer." in n) for n in base if "_proj" in n and "experts" not in n
    )
    assert not any(".indexer." in n for n in load_file(checkpoints(Path(settings.out))[0] / lora.TENSORS))


def test_the_callers_model_is_left_as_it_was(here: Workplace, tmp_path: Path) -> None:
    """But for its weights, which are those of the last step, also if the run fails."""
    made, base = tokensieve.load(here.root / "sparse"), tensors_of(here.root / "sparse")
    made.lm_head.requires_grad_(False)
    kinds = {name: type(module) for name, module in made.named_modules()}

    def fail(step: int, figures: dict[str, float]) -> None:
        if step == 2:
            raise KeyError("stop")

    with pytest.raises(KeyError):
        run(
            here.run("adapt", "fails", lora=LORA, out=str(tmp_path)), made, on_step=fail, progress=False, rehearse=False
        )
    assert kinds == {name: type(module) for name, module in made.named_modules()}
    assert [n for n, x in made.named_parameters() if not x.requires_grad] == ["lm_head.weight"]
    assert not hasattr(made, "peft_config") and not hasattr(made.model, "peft_config")
    assert difference(made.state_dict()["model.layers.0.self_attn.o_proj.weight"], base[
        "model.layers.0.self_attn.o_proj.weight"
    ]) > 1e-4  # fmt: skip
    assert not (tmp_path / MERGED).exists()


def test_the_optimizer_has_adapters_and_indexers(here: Workplace) -> None:
    made = model()
    config = TrainConfig("adapt", "", "", (PhaseConfig(1, 48, 4),), optimizer=OPTIMIZER, lora=LORA)
    with lora.adapted(made, LORA), learning(made, "all"):
        names = {p: n for n, p in made.named_parameters()}
        optimizer = make_optimizer(config, made, torch.device("cpu"))
        peaks = {names[p]: group["peak"] for group in optimizer.param_groups for p in group["params"]}
        adapters = {n for n in names.values() if ".lora_" in n}
        copies = {n for n in names.values() if ".modules_to_save." in n}
        assert peaks == dict.fromkeys(adapters, OPTIMIZER.lr) | dict.fromkeys(copies, OPTIMIZER.indexer_lr)
        assert len(adapters) == 2 * sum(n.endswith("lora_A.default.weight") for n in adapters) and copies
        estimate = cost.run_estimate(made.config, config, 1e9, adapters=lora.adapters_of(made))
        trainable = sum(p.numel() for p in made.parameters() if p.requires_grad)
        total = sum(p.numel() for p in made.parameters())
    assert estimate.gradient_bytes == 4 * trainable and estimate.optimizer_bytes == 8 * trainable
    router_bias = sum(b.numel() for n, b in made.named_buffers() if n.endswith("correction_bias"))
    assert estimate.weight_bytes == 4 * (total + router_bias)
    whole = cost.run_estimate(made.config, config, 1e9)
    assert 0.6 * whole.flops < estimate.flops < whole.flops


# ---- resuming


def test_resumed_bit_for_bit(here: Workplace) -> None:
    """With dropout, whose random numbers go on too."""
    phases = PhaseConfig(3, 48, 4, 2), PhaseConfig(2, 96, 2, 1, lr_scale=0.5)
    setting = replace(LORA, dropout=0.2, targets=("q_b_proj", "o_proj", "down_proj"))
    straight = here.run("adapt", "straight", *phases, lora=setting, save_every=1)
    run(straight, progress=False)
    parts = replace(straight, out=f"{straight.out}-parts", save_every=2)

    def stop(done: int, _: dict[str, float]) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    for step in (1, 2, 3, 4):
        with pytest.raises(Interrupted, match=f"step-00000{step}"):
            run(parts, resume=True, on_step=stop, progress=False)
        assert not (Path(parts.out) / MERGED).exists()
    run(parts, resume=True, progress=False)
    figures = [
        [{k: v for k, v in row.items() if k not in MEASURED} for row in history(x.out)] for x in (straight, parts)
    ]
    assert figures[0] == figures[1] and len(figures[0]) == 5
    for name in (f"step-000005/{lora.TENSORS}", "step-000005/optimizer.safetensors", "merged/model.safetensors"):
        left, right = (load_file(Path(x.out) / name) for x in (straight, parts))
        assert left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left), name


def test_an_adapter_that_does_not_fit_is_refused(here: Workplace, tmp_path: Path) -> None:
    """Another base of other shapes, a run without adapters, and the other way round: nothing is changed."""
    settings = here.run("adapt", "fits", lora=LORA, save_every=2, keep=1)
    run(settings, progress=False, rehearse=False)
    before = {p: p.read_bytes() for p in Path(settings.out).rglob("*") if p.is_file()}
    other = model(q_lora_rank=24)
    weights = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(UserError, match=r"adapter_model.safetensors: .*q_[ab]_proj.*the model that the run began with"):
        run(settings, other, resume=True, progress=False, rehearse=False)
    assert all(torch.equal(t, weights[n]) for n, t in other.state_dict().items())
    with pytest.raises(UserError, match=r"lora\.\w+ is"):
        run(replace(settings, lora=None), resume=True, progress=False, rehearse=False)
    with pytest.raises(UserError, match=r"lora.rank is 8, in the run that is there 4"):
        run(replace(settings, lora=replace(LORA, rank=8)), resume=True, progress=False, rehearse=False)
    assert before == {p: p.read_bytes() for p in Path(settings.out).rglob("*") if p.is_file()}


# ---- refusals


@pytest.mark.parametrize("targets", ["v_proj", ("o_proj", "wq_b"), ("experts.up_proj",), ("roj",), "lm_head"])
def test_a_target_that_names_no_layer_is_refused(targets: Any, here: Workplace, tmp_path: Path) -> None:
    settings = here.run("adapt", "bad", lora=replace(LORA, targets=targets), out=str(tmp_path / "out"))
    named = targets if isinstance(targets, str) else targets[-1]
    with pytest.raises(
        UserError, match=rf"lora.targets: '{named}' names no linear layer.* kv_b_proj.*experts.down_proj"
    ):
        run(settings, progress=False, rehearse=False)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_peft_would_misread_is_named(caplog: pytest.LogCaptureFixture) -> None:
    for config, warned in ((LORA, False), (replace(LORA, merge=False), True)):
        with lora.adapted(model(), config):
            assert ("down_proj, gate_proj, up_proj into the experts" in caplog.text) == warned
    caplog.clear()
    with lora.adapted(model(), LoraConfig(merge=False, targets="o_proj")):
        assert not caplog.text


def test_bad_settings_are_refused(here: Workplace) -> None:
    for changes, message in (({"rank": 0}, "lora.rank is 0"), ({"dropout": 1.0}, "lora.dropout is 1.0")):
        with pytest.raises(UserError, match=message):
            LoraConfig(**changes)
    for targets in ("all-linear", ("o_proj", "experts.down_proj")):
        setting = LoraConfig(dropout=0.1, targets=targets)
        with pytest.raises(UserError, match="lora.dropout is 0.1"), lora.adapted(model(), setting):
            raise AssertionError("not reached")
    with pytest.raises(UserError, match="lora is a setting of adapt"):
        here.run("warmup", "bad", lora=LORA)
    with pytest.raises(UserError, match="lora.targets names no layer"), lora.adapted(model(), LoraConfig(targets=())):
        raise AssertionError("not reached")


def test_a_run_is_no_model(here: Workplace) -> None:
    """Nor is its adapter. The refusal names the merged model, or how to write it; else the last checkpoint."""
    outs = {}
    for name, lora_config in (("merged", LORA), ("apart", replace(LORA, merge=False)), ("whole", None)):
        settings = here.run("adapt", f"refused-{name}", PhaseConfig(1, 48, 1), lora=lora_config)
        run(settings, progress=False, rehearse=False)
        outs[name] = Path(settings.out)
    later = "to write its merged model, {}/merged, run the same command with --resume --set lora.merge=true"
    for name, remedy in (("merged", "give its merged model: {}/merged"), ("apart", later)):
        out = outs[name]
        for folder, what in ((out, "folder of a training run"), (out / "step-000001", "adapter of a LoRA run")):
            for read in (tokensieve.load, tokensieve.load_tokenizer):
                with pytest.raises(UserError) as error:
                    read(folder)
                assert str(error.value) == f"{folder}: the {what}, not a model; {remedy.format(out)}"
    (outs["merged"] / "step-000001").rename(moved := outs["merged"].parent / "moved")
    with pytest.raises(UserError, match="a PEFT adapter, not a model; merge it into its base"):
        tokensieve.load(moved)
    last = re.escape(str(outs["whole"] / "step-000001"))
    with pytest.raises(UserError, match=f"a training run, not a model; give its last checkpoint: {last}$"):
        tokensieve.load(outs["whole"])
    shutil.rmtree(outs["whole"] / "step-000001")
    with pytest.raises(UserError, match="has no checkpoint yet; continue it with --resume"):
        tokensieve.load(outs["whole"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_cost_of_experts_adapters(checkpointing: bool) -> None:
    """That of W + B A once a pass, and of its gradient for the experts of each token, as torch counts them."""

    def counted(targets: tuple[str, ...], rows: int) -> tuple[int, float]:
        made, setting = model().train(), replace(LORA, targets=targets)
        phase = PhaseConfig(1, 48, rows, rows)
        config = TrainConfig("adapt", "", "", (phase,), lora=setting, activation_checkpointing=checkpointing)
        made.model.gradient_checkpointing = checkpointing
        micro = batch(rows, 48)
        totals = StepTotals(labels=47 * rows, queries=48 * rows)
        with lora.adapted(made, setting), learning(made, "all"):
            with FlopCounterMode(display=False) as counter:
                backward(STAGES["adapt"], made, micro, totals, options_of(STAGES["adapt"], config), torch.device("cpu"))
            needed = cost.run_estimate(made.config, config, 1.0, adapters=lora.adapters_of(made))
        return counter.get_total_flops(), needed.flops

    with_experts = ("o_proj", "experts.gate_up_proj", "experts.down_proj")
    for rows in (1, 4):
        (more, expected), (fewer, without) = counted(with_experts, rows), counted(("o_proj",), rows)
        assert more - fewer == expected - without > 0


def test_the_memory_of_experts_adapters() -> None:
    """W + B A is kept for the backward pass, of every layer or of one."""
    made = model()
    settings = TrainConfig("adapt", "", "", (PhaseConfig(1, 48, 1),))
    with lora.adapted(made, replace(LORA, targets=("experts.gate_up_proj",))):
        adapters = lora.adapters_of(made)
    weights = made.model.layers[1].mlp.experts.gate_up_proj.numel()
    assert adapters == cost.Adapters(linear=0, experts=4 * 8 * (32 + 48), weights=weights, layers=1, rank=4)
    needed, linear = (cost.run_estimate(made.config, settings, 1.0, adapters=a) for a in (adapters, cost.Adapters(1)))
    assert needed.activation_bytes - linear.activation_bytes == 2 * 4 * weights
    three = replace(adapters, weights=3 * weights, layers=3)
    assert three.sum_bytes(4, 2, checkpointing=False) == (3 * 2 + 4) * weights
    assert three.sum_bytes(4, 2, checkpointing=True) == (2 + 4) * weights


# ---- the command


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("commands"))


def test_the_command(run: Command, home: Path, tmp_path: Path) -> None:
    """An adapter alone, which is merged later; then merged at once, which eval takes."""
    options = ("--set", "lora.rank=4", "--set", 'lora.targets=["q_b_proj", "o_proj"]')
    ended = run(*tiny(home, "adapt", tmp_path, *options, "--set", "lora.merge=false"))
    assert ended.status == 0, ended
    assert f"{tmp_path}/step-000003: the trained adapter" in ended.out and "lora.merge=true" in ended.out
    assert not (tmp_path / "merged").exists()
    ended = run(*tiny(home, "adapt", tmp_path, *options, "--resume"))
    assert ended.status == 0, ended
    assert f"{tmp_path}/merged: the trained model" in ended.out
    assert f"Next: tokensieve eval {tmp_path}/merged" in ended.out
    assert tokensieve.load(tmp_path / "merged").is_sparse
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "Training, `adapt`: 3 steps" in card and "choose at random" not in card


def test_the_command_refuses_in_one_line(
    run: Command, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = refusal(run)
    for words, setting in (
        (("'nothing'", "q_b_proj"), "lora.targets=nothing"),
        (("lora.rank is 0",), "lora.rank=0"),
        (("unknown key ranks",), "lora.ranks=4"),
    ):
        refused(words, *tiny(home, "adapt", tmp_path / "out", "--set", setting))
    refused(("lora is a setting of adapt",), *tiny(home, "warmup", tmp_path / "out", "--set", "lora.rank=4"))
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("importlib.metadata.requires", lambda _: ['peft>=0.18; extra == "lora"'])
    refused(("peft", "pip install 'peft>="), *tiny(home, "adapt", tmp_path / "out", "--set", "lora.rank=4"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_is_named(here: Workplace) -> None:
    settings = here.run("adapt", "damaged", lora=LORA)
    run(settings, progress=False, rehearse=False)
    (last,) = checkpoints(Path(settings.out))
    save_file({"x": torch.zeros(1)}, last / lora.TENSORS)
    with pytest.raises(UserError, match=r"adapter_model.safetensors: is damaged"):
        run(settings, resume=True, progress=False, rehearse=False)
