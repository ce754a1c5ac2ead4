"""The loop that every stage shares: cutting a step up, clipping, schedule, phases, figures, and bad input."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tokensieve
from tests.support.training import OPTIMIZER, Workplace, apart, batch, cut, indexers, model, step_gradients, workplace
from tokensieve.config import OptimizerConfig, PhaseConfig, TrainConfig, UserError
from tokensieve.train import batches, history, loop, run
from tokensieve.train.learning import learning
from tokensieve.train.schedule import lr_share, position, total_steps
from tokensieve.train.starting import make_optimizer, start

FREE = replace(OPTIMIZER, clip=1e9, indexer_clip=1e9)
STAGES = ["pretrain", "warmup", "adapt"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return workplace(tmp_path_factory.mktemp("loop"))


def config(stage: str, **changes: Any) -> TrainConfig:
    made = TrainConfig(stage, "", "", (PhaseConfig(4, 48, 4, 4),), optimizer=FREE, device="cpu")
    return replace(made, **changes)


def fresh(stage: str, **changes: Any):
    return model("v3" if stage == "pretrain" else "v32", **changes)


def weighted(step: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return step | {"loss_weights": torch.randint(1, 9, step["labels"].shape, generator=generator).float()}


# ---- one step


@pytest.mark.parametrize(("stage", "every"), [("pretrain", 1), ("warmup", 1), ("warmup", 4), ("adapt", 1)])
def test_gradients_do_not_depend_on_the_micro_batches(stage: str, every: int) -> None:
    """Rows hold different numbers of labels, documents and weights, so that a mean of means would differ."""
    step = weighted(batch(4, 48, documents=True))
    step["labels"][2, 10:] = -100
    settings = config(stage, kl_every=every)
    whole, figures = step_gradients(settings, fresh(stage).double(), [step])
    for parts in (2, 4):
        found, again = step_gradients(settings, fresh(stage).double(), cut(step, parts))
        assert apart(found, whole) < 1e-6
        for name in ("loss", "lm", "kl", "grad_norm", "indexer_grad_norm"):
            assert (name in again) == (name in figures)
            assert name not in again or again[name] == pytest.approx(figures[name], rel=1e-6)


def test_every_step_has_the_kl_at_other_queries(here: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, backward = [], loop.backward

    def recording(stage, model, batch, totals, options, device):
        queries.append(options.objective.queries(96, device))
        return backward(stage, model, batch, totals, options, device)

    monkeypatch.setattr(loop, "backward", recording)
    run(here.run("warmup", "every", kl_every=3, phases=(PhaseConfig(4, 48, 1),)), progress=False, rehearse=False)
    assert [(q.rows, q.others) for q in queries] == [(slice(first, None, 3), None) for first in (0, 1, 2, 0)]
    queries.clear()
    run(here.run("adapt", "blocks", kl_every=3, phases=(PhaseConfig(4, 96, 1),)), progress=False, rehearse=False)
    for first, found in zip((0, 1, 2, 0), queries, strict=True):
        assert found.rows.tolist() == [*range(32 * first, 32 * first + 32)]
        assert sorted([*found.rows.tolist(), *found.others.tolist()]) == [*range(96)]


def test_a_dense_twin_has_no_kl_to_leave_out(here: Workplace) -> None:
    """The config of an adaptation with `kl_every` runs densely too."""
    phases = (PhaseConfig(2, 96, 1),)
    run(here.run("adapt", "twin", kl_every=3, selection="dense", phases=phases), progress=False, rehearse=False)


def test_labels_are_weighted_over_the_whole_step() -> None:
    step = weighted(batch(2, 48, documents=True))
    made = fresh("pretrain")
    _, figures = step_gradients(config("pretrain"), made, cut(step, 2))
    logits = made(step["input_ids"], position_ids=step["position_ids"]).logits[:, :-1]
    entropy = torch.nn.functional.cross_entropy(logits.transpose(1, 2), step["labels"][:, 1:], reduction="none")
    weights = step["loss_weights"][:, 1:] * (step["labels"][:, 1:] != -100)
    assert figures["lm"] == pytest.approx(((entropy * weights).sum() / weights.sum()).item(), rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_recomputing_layers_changes_nothing(stage: str) -> None:
    step = batch(2, 48, documents=True)
    plain, figures = step_gradients(config(stage), fresh(stage), [step])
    made = fresh(stage)
    made.model.gradient_checkpointing = True
    found, again = step_gradients(config(stage), made, [step])
    assert all(torch.equal(found[n], plain[n]) for n in plain) and found.keys() == plain.keys()
    assert again["loss"] == figures["loss"] and again.get("kl") == figures.get("kl")


def test_indexers_and_trunk_are_clipped_apart() -> None:
    step = [batch(4, 48)]
    free, figures = step_gradients(config("adapt"), fresh("adapt"), step)
    clips = replace(FREE, clip=0.5 * figures["grad_norm"], indexer_clip=0.25 * figures["indexer_grad_norm"])
    found, again = step_gradients(config("adapt", optimizer=clips), fresh("adapt"), step)
    scale = {n: 0.25 if ".indexer." in n else 0.5 for n in free}
    assert apart(found, {n: g * scale[n] for n, g in free.items()}) < 1e-5
    assert again["grad_norm"] == figures["grad_norm"]  # as it was before clipping
    norm = torch.stack([g.square().sum() for g in indexers(free).values()]).sum().sqrt()
    assert figures["indexer_grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


NAN_PLACES = [
    (place, stage)
    for place in ("layers.0.input_layernorm.weight", "norm.weight")
    for stage in STAGES
    if (place, stage) != ("norm.weight", "warmup")  # the last norm is not part of the warm-up's loss
]


@pytest.mark.parametrize(("place", "stage"), NAN_PLACES)
def test_a_nan_changes_nothing(place: str, stage: str) -> None:
    """Be it in the indexers' inputs, where the ops refuse it, or in the loss only."""
    made = fresh(stage)
    with torch.no_grad():
        made.model.get_parameter(place)[0] = math.nan
    before = {n: x.clone() for n, x in made.state_dict().items()}
    with pytest.raises(UserError, match=r"step 1: .*(not finite|NaN).*nothing was changed; .* lower learning rate"):
        step_gradients(config(stage), made, [batch(2, 48)])
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0)), name


def test_optimizer_groups() -> None:
    made = fresh("adapt")
    optimizer = make_optimizer(config("adapt", optimizer=replace(FREE, weight_decay=0.1)), made, torch.device("cpu"))
    names = {p: n for n, p in made.named_parameters()}
    seen = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            seen[names[parameter]] = (group["peak"], group["weight_decay"])
    assert seen == {
        n: (FREE.indexer_lr if ".indexer." in n else FREE.lr, 0.1 if p.dim() > 1 else 0.0)
        for n, p in made.named_parameters()
    }
    with learning(made, "indexers"):
        optimizer = make_optimizer(
            config("warmup", optimizer=replace(FREE, indexer_lr=None)), made, torch.device("cpu")
        )
    assert {g["peak"] for g in optimizer.param_groups} == {FREE.lr}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(made.indexer_parameters())


# ---- schedule


def test_schedule() -> None:
    phases = (PhaseConfig(6, 8, 1), PhaseConfig(6, 16, 2, lr_scale=0.5, lr_scale_end=0.1))
    o = OptimizerConfig(lr=1.0, warmup_steps=4, lr_end=0.1)
    shares = [lr_share(o, phases, step) for step in range(12)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    cosine = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (s - 4) / 8)) for s in range(4, 12)]
    scales = [1.0, 1.0, 0.5, 0.42, 0.34, 0.26, 0.18, 0.1]
    assert shares[4:] == pytest.approx([c * s for c, s in zip(cosine, scales, strict=True)])
    flat = OptimizerConfig(lr_end=1.0)
    assert [lr_share(flat, phases[:1], s) for s in range(6)] == [1.0] * 6
    assert total_steps(phases) == 12
    assert [tuple(position(phases, s)) for s in (0, 5, 6, 11)] == [(0, 0, 0), (0, 5, 5), (1, 0, 0), (1, 5, 10)]
    with pytest.raises(ValueError, match="past the end"):
        position(phases, 12)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((), r"no phases"),
        ((PhaseConfig(0, 48, 4),), r"phases.steps is 0"),
        ((PhaseConfig(1, 0, 4),), r"phases.context is 0"),
        ((PhaseConfig(1, 48, 0),), r"phases.sequences is 0"),
        ((PhaseConfig(1, 48, 4, 0),), r"phases.micro_batch is 0"),
        ((PhaseConfig(1, 48, 4, 3),), r"4 sequences do not divide into micro-batches of 3"),
        ((PhaseConfig(1, 257, 1),), r"257 is past the model's 256 positions"),
    ],
)
def test_bad_phases(phases: tuple[PhaseConfig, ...], message: str, here: Workplace) -> None:
    wrong = replace(here.run("warmup", "bad"), phases=phases)
    with pytest.raises(UserError, match=message):
        run(wrong, progress=False)
    assert not Path(wrong.out).exists()


# ---- whole runs


@pytest.fixture(scope="module")
def adapted(here: Workplace) -> tuple[TrainConfig, Any, list]:
    """A run of two phases, one row of figures every second step."""
    settings = here.run(
        "adapt",
        "adapted",
        PhaseConfig(3, 48, 4, 2),
        PhaseConfig(2, 96, 2, 1, lr_scale=0.5),
        log_every=2,
        track=("tensorboard",),
    )
    steps: list[tuple[int, dict[str, float]]] = []
    made = run(settings, on_step=lambda step, figures: steps.append((step, figures)), progress=False)
    return settings, made, steps


def test_a_run_of_two_phases(adapted: tuple[TrainConfig, Any, list]) -> None:
    settings, made, steps = adapted
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5]
    assert all(
        {"loss", "lm", "kl", "grad_norm", "indexer_grad_norm", "lr", "tokens_per_second"} <= set(f) for _, f in steps
    )
    tokens = [f["tokens_per_second"] * f["seconds"] for _, f in steps]
    assert tokens == pytest.approx([192.0] * 5)
    peaks = [OPTIMIZER.lr * lr_share(OPTIMIZER, settings.phases, s) for s in range(5)]
    assert [f["lr"] for _, f in steps] == pytest.approx(peaks)
    assert not made.training and all(p.requires_grad for p in made.parameters())
    ids = batch(1, 60)["input_ids"]
    saved = tokensieve.load(Path(settings.out) / "step-000005")
    assert torch.equal(saved(ids).logits, made(ids).logits)
    assert len(tokensieve.load_tokenizer(saved.folder)) == made.config.vocab_size


def test_figures_are_written(adapted: tuple[TrainConfig, Any, list]) -> None:
    settings, _, steps = adapted
    rows = history(settings.out)
    assert [r["step"] for r in rows] == [2, 4, 5]
    assert rows == [{"step": s, **f} for s, f in steps if s in (2, 4, 5)]
    assert list((Path(settings.out) / "tensorboard").glob("events.out.tfevents.*"))
    assert json.loads((Path(settings.out) / "config.json").read_text())["stage"] == "adapt"
    with pytest.raises(UserError, match="'paper' is unknown; use tensorboard or wandb"):
        run(replace(settings, out=settings.out + "2", track=("paper",)), progress=False)


def test_the_estimate_is_logged_before_the_first_step(here: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []
    with caplog.at_level(logging.INFO, logger="tokensieve"):
        run(
            here.run("warmup", "estimate", PhaseConfig(1, 48, 2)),
            on_step=lambda *_: seen.append(len(caplog.messages)),
            progress=False,
        )
    estimates = [i for i, m in enumerate(caplog.messages) if m.startswith("warmup: about") and "GiB" in m]
    assert estimates and estimates[0] < seen[0]
    assert len(set(caplog.messages)) == len(caplog.messages)  # nothing is said twice
    assert len(caplog.messages) == seen[0]  # nor while the bar is shown, which it would tear


def test_micro_batches_do_not_change_a_run(here: Workplace) -> None:
    found = []
    for name, size in (("cut", 1), ("whole", 2)):
        # Three steps: later the rounding of an indexer's gradient may swap two keys of almost the same score.
        phase = PhaseConfig(3, 64, 2, size)
        losses: list[float] = []
        model = run(
            here.run("adapt", name, phases=(phase,)),
            on_step=lambda _, f, to=losses: to.append(f["loss"]),
            progress=False,
        )
        found.append((losses, model.state_dict()))
    (cut, a), (whole, b) = found
    assert cut == pytest.approx(whole, rel=1e-6)
    for name, tensor in a.items():
        # Adam turns the rounding of tiny gradients into small steps.
        assert torch.allclose(tensor, b[name], atol=1e-4), name


def test_dense_arm_trains_the_trunk_only(here: Workplace) -> None:
    settings = here.run("adapt", "dense-arm", selection="dense")
    assert settings == here.run("adapt", "dense-arm", selection=False)
    before = tokensieve.load(settings.model).state_dict()
    steps: list[dict[str, float]] = []
    after = run(settings, on_step=lambda _, f: steps.append(f), progress=False).state_dict()
    assert all(torch.equal(before[n], after[n]) == (".indexer." in n or "correction_bias" in n) for n in before)
    assert all("kl" not in f and "indexer_grad_norm" not in f for f in steps)
    dense = run(replace(settings, model=str(here.root / "dense"), out=settings.out + "2"), progress=False)
    assert not dense.is_sparse
    with pytest.raises(UserError, match="make it sparse first"):
        run(replace(settings, model=str(here.root / "dense"), selection=True, out=settings.out + "3"), progress=False)


def test_warmup_run_lowers_the_kl(here: Workplace) -> None:
    settings = here.run("warmup", "warm", PhaseConfig(12, 48, 4, 4))
    kl: list[float] = []
    before = tokensieve.load(settings.model).state_dict()
    after = run(settings, on_step=lambda _, f: kl.append(f["kl"]), progress=False).state_dict()
    assert kl[-1] < 0.8 * kl[0]
    assert all(torch.equal(before[n], after[n]) for n in before if ".indexer." not in n)


def test_pretraining_learns_and_begins_anew(here: Workplace) -> None:
    settings = here.run("pretrain", "pretrain", PhaseConfig(8, 48, 8, 8, yarn=False), PhaseConfig(2, 96, 2))
    lm: list[float] = []
    made = run(settings, on_step=lambda _, f: lm.append(f["lm"]), progress=False)
    assert not made.is_sparse and lm[-1] < lm[0] - 0.3
    assert (Path(settings.out) / "step-000010" / "tokenizer.json").is_file()
    with pytest.raises(UserError, match="holds a run already .*add --resume"):
        run(settings, progress=False)
    with pytest.raises(UserError, match="unknown key hidden;"):
        run(replace(settings, shape={"hidden": 3}, out=settings.out + "2"), progress=False)


def test_pretraining_goes_on_past_the_models_positions(here: Workplace) -> None:
    before = tokensieve.load(here.root / "dense")
    positions = before.config.max_position_embeddings
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": positions}
    shape = {"max_position_embeddings": 2 * positions, "rope_parameters": rope}
    own, long = str(here.root / "dense"), PhaseConfig(1, 2 * positions, 1)
    settings = here.run("pretrain", "extended", long, model=own, shape=shape)
    begun = start(settings, None)
    assert all(torch.equal(tensor, begun.state_dict()[name]) for name, tensor in before.state_dict().items())
    theta = before.config.rope_parameters["rope_theta"]
    assert begun.config.rope_parameters.items() >= (rope | {"rope_theta": theta}).items()
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        assert not torch.equal(begun(ids).logits, before(ids).logits)  # the new frequencies are used

    run(settings, progress=False)
    made = run(replace(settings, phases=(replace(long, steps=2),)), resume=True, progress=False)
    assert made.config.max_position_embeddings == 2 * positions
    with pytest.raises(UserError, match="512 is past the model's 256 positions"):
        run(here.run("pretrain", "short", long, model=own, shape={}), progress=False)
    with pytest.raises(
        UserError, match="hidden_size cannot change, .* give max_position_embeddings and rope_parameters"
    ):
        run(replace(settings, shape={"hidden_size": 64}, out=settings.out + "2"), progress=False)


# ---- answers count more


def test_answer_weights_reach_the_loss(here: Workplace) -> None:
    settings = here.run("pretrain", "answers", PhaseConfig(1, 96, 2))
    for weight in (1.0, 8.0):
        data = here.data(answer_weight=weight)
        dataset = loop.build_dataset(data, tokensieve.load_tokenizer(data.tokenizer), 96, 2, seed=0)
        assert ("loss_weights" in dataset[0]) == (weight != 1.0)
    step = batch(2, 48)
    step["loss_weights"] = torch.ones(2, 48)
    plain, _ = step_gradients(config("pretrain"), fresh("pretrain"), [batch(2, 48)])
    ones, _ = step_gradients(config("pretrain"), fresh("pretrain"), [step])
    assert apart(ones, plain) < 1e-6
    step["loss_weights"] = torch.zeros(2, 48)
    step["loss_weights"][0, 5] = 3.0
    _, figures = step_gradients(config("pretrain"), fresh("pretrain"), [step])
    made = fresh("pretrain")
    log_p = made(step["input_ids"]).logits[0, 4].log_softmax(-1)
    assert figures["lm"] == pytest.approx(-log_p[step["labels"][0, 5]].item(), rel=1e-5)
    assert batches._label_weight(step) == 3.0 and settings.data.answer_weight == 1.0


# ---- compile, signals


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_layers_train_the_same(here: Workplace) -> None:
    lm: dict[bool, list[float]] = {False: [], True: []}
    for compiled in lm:
        settings = here.run("adapt", f"compiled-{compiled}", PhaseConfig(3, 48, 2), compile=compiled)
        made = run(settings, on_step=lambda _, f, to=lm[compiled]: to.append(f["lm"]), progress=False)
        assert tokensieve.load(Path(settings.out) / "step-000003")(batch(1, 20)["input_ids"]).logits.isfinite().all()
        assert set(made.state_dict()) == set(model().state_dict())
    assert lm[True] == pytest.approx(lm[False], rel=1e-4)


# ---- the caller's model


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ends", ["by an error", "at the end"])
def test_a_run_leaves_the_callers_model_as_it_was(stage: str, ends: str, here: Workplace) -> None:
    """But for its weights: what is frozen, its mode, its checkpointing, its hooks, and how its passes go."""

    class Broken(Exception):
        pass

    def fail(step: int, _: Any) -> None:
        if ends == "by an error" and step == 2:
            raise Broken

    made = fresh(stage)
    frozen = made.model.layers[0].self_attn.o_proj.weight.requires_grad_(False)
    made.train()
    before = {n: p.requires_grad for n, p in made.named_parameters()}
    settings = here.run(stage, f"borrowed-{stage}-{ends[:2]}", activation_checkpointing=True, backend="reference")
    try:
        tokensieve.train.run(settings, made, on_step=fail, progress=False)
    except Broken:
        assert ends == "by an error" and made.training
    else:
        assert ends == "at the end" and not made.training
    assert {n: p.requires_grad for n, p in made.named_parameters()} == before and not frozen.requires_grad
    assert all(p.grad is None for p in made.parameters()) and not made.model.gradient_checkpointing
    assert not made.model._forward_pre_hooks and not made.model._forward_hooks
    out = made.train()(**batch(1, 40))
    assert out.kl is None and out.logits is not None and out.loss.requires_grad
