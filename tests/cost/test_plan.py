"""Plans of training runs: time against measured steps and hand counts, traffic against measured bytes, refusals."""

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tokensieve import cost
from tokensieve.config import PhaseConfig, TrainConfig, UserError
from tokensieve.cost.division import refusal
from tokensieve.cost.gpus import GPUS
from tokensieve.cost.paper import published_shape
from tokensieve.cost.plan import Job, StagePlan, plan, usable
from tokensieve.cost.rates import PEAK, Rate
from tokensieve.cost.train_memory import Ranks, layer_parameters
from tokensieve.cost.train_rates import GROUPED, LITE, TrainRates, measured_rates, measurements
from tokensieve.mesh import Mesh
from tokensieve.train.parallelize import divide

SMALL = {"model_type": "qwen3_dsa", "vocab_size": 320, "hidden_size": 48, "intermediate_size": 64}
SMALL |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
SMALL |= {"index_n_heads": 4, "index_head_dim": 64, "index_topk": 16}
# The attention of the 671B model in layers of another width.
OTHER = replace(published_shape(), hidden=5120, layers=1, moe_layers=0, index_layers=1)
H200 = GPUS["h200"]


def run(stage: str = "adapt", steps: int = 10, context: int = 4096, sequences: int = 8, **changes: Any) -> TrainConfig:
    phases = (PhaseConfig(steps, context, sequences),)
    return TrainConfig(stage, "", "", **{"phases": phases, "activation_checkpointing": True} | changes)


def planned(config: TrainConfig, shape: Any, gpus: int = 8, gpu: str = "h200", **more: Any) -> StagePlan:
    shape = shape if isinstance(shape, cost.Shape) else cost.shape_of(shape)
    return plan(Job(config, shape, more.pop("adapters", None)), GPUS[gpu], gpus, more.pop("rates", TrainRates()))


# time


# Layers, width of the compressed queries, and seconds of a sequence on one H200, dense, in warm-up and in adaptation:
# docs/results/training.md (8192 tokens) and docs/plan.md.
STEPS = {
    8192: (20, None, 8192 / 13794, 8192 / 30922, 8192 / 6644),
    32768: (4, 1536, 0.8437, 0.3619, 1.1757),
    131072: (4, 1536, 8.125, 4.487, 5.740),
}
STAGES = ("pretrain", "warmup", "adapt")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("context", STEPS)
def test_a_measured_stack_takes_its_measured_time(stage: str, context: int) -> None:
    """On eight GPUs an eighth of eight sequences' time."""
    layers, compressed, *seconds = STEPS[context]
    shape = cost.shape_of(LITE | {"num_hidden_layers": layers, "q_lora_rank": compressed})
    model = run(stage, phases=(PhaseConfig(1, context, 8, 8),), context_parallel=8)
    found = planned(model, shape)
    expected = seconds[STAGES.index(stage)]
    assert sum(part.seconds for part in found.phases[0].parts) == pytest.approx(expected, rel=1e-9)
    assert found.label == "measured"
    assert measured_rates(shape, stage, context, GPUS["h100"]).attention.label == "measured on H200"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("context", STEPS)
def test_the_shares_of_measured_stacks_by_hand(stage: str, context: int) -> None:
    """From the FLOPs of a V2-Lite layer, written out: the plan's own count would give its own time with any FLOPs."""
    layers, compressed, *seconds = STEPS[context]
    D, H, k, T, V, source = 2048, 16, 2048, context, 102400, compressed or 2048
    attention = D * (compressed or 0) + source * H * 192 + D * 576 + 512 * H * 256 + H * 128 * D
    indexer = source * 16 * 128 + D * 128 + D * 16
    layer, head = attention + D * 64 + (6 + 2) * 3 * D * 1408, D * V
    seen, selected = T * (T + 1) // 2, k * (k + 1) // 2 + (T - k) * k
    # Of a query and a key. A score is the weighted sum of the index heads' products.
    dense, latent, score, gradients = 2 * H * (192 + 128), 2 * H * (576 + 512), 2 * 16 * (128 + 1), 4 * 16 * 128
    flops = {
        # Products three times and attention three and a half times, the layers' forward pass once more.
        "pretrain": 6 * T * (layers * layer + head) + 2 * T * layers * layer + layers * 4.5 * seen * dense,
        # Forward alone, without the head; the target; a score and its two gradients.
        "warmup": layers * (2 * T * (layer + 2 * indexer) + seen * (dense + 2 * H * 192 + score + gradients)),
        # A score of each key forward, and again; of each selected one twice, with its two gradients.
        "adapt": 6 * T * (layers * layer + head)
        + 2 * T * layers * (layer + 3 * indexer)
        + layers * (4.5 * selected * latent + 2 * seen * score + selected * (2 * score + gradients)),
    }[stage]
    (found,) = (
        m for m in measurements() if m.step and m.shape.attention.heads == H and (m.stage, m.context) == (stage, T)
    )
    assert found.share() == pytest.approx(flops / seconds[STAGES.index(stage)] / 989.5e12, rel=1e-9)


@pytest.mark.parametrize(
    ("stage", "context", "ms"),
    [("pretrain", 32768, 302.1), ("adapt", 131072, 1186), ("warmup", 131072, 1280 + 2965), ("warmup", 8192, 29.991)],
)
def test_a_measured_layer_takes_its_measured_time(stage: str, context: int, ms: float) -> None:
    """docs/kernels.md: attention of one layer of the 671B model. No step of this width was measured."""
    model = run(stage, context=context, sequences=8, context_parallel=8, activation_checkpointing=False)
    products, attention = planned(model, OTHER).phases[0].parts
    assert attention.seconds == pytest.approx(ms / 1e3, rel=1e-9) and attention.label == "measured"
    assert products.label == "roofline"
    assert products.seconds == products.flops / H200.bf16


def test_a_step_of_fewer_experts_stands_for_more() -> None:
    """Of the 671B model's widths with 32 experts, for 256: labelled so. Attention alone where no step was measured."""
    shape = published_shape()
    steps = {m.context: m for m in measurements() if m.step and m.describes(shape) and m.stage == "adapt"}
    assert {m.shape.experts for m in steps.values()} == {32} and shape.experts == 256
    for context, step in steps.items():
        rates = measured_rates(shape, "adapt", context, GPUS["h800"])
        assert rates.products == rates.attention
        assert (rates.products.share, rates.products.label) == (step.share(), "extrapolated")
        few = measured_rates(replace(shape, experts=32), "adapt", context, GPUS["h800"])
        assert few.products.label == "measured on H200"
    alone = measured_rates(replace(shape, hidden=5120), "pretrain", 131072, H200)
    dense = measured_rates(shape, "pretrain", 131072, H200)
    assert dense.attention.share == alone.attention.share > dense.products.share
    assert dense.products.label == "extrapolated" and alone.products.label == "roofline"


def test_shares_between_contexts_and_beyond() -> None:
    lite = cost.shape_of(LITE)
    at = {c: measured_rates(lite, "adapt", c, H200).products.share for c in (2048, 8192, 16384, 32768, 1 << 20)}
    assert at[2048] == at[8192] and at[1 << 20] == measured_rates(lite, "adapt", 131072, H200).products.share
    assert at[16384] == pytest.approx((at[8192] + at[32768]) / 2)
    assert all(0.05 < m.share() < 0.6 for m in measurements())
    for other in (SMALL, LITE | {"hidden_size": 4096}, GROUPED | {"num_key_value_heads": 4}):
        assert measured_rates(cost.shape_of(other), "adapt", 8192, H200) == TrainRates()
    labels = [measured_rates(lite, "adapt", c, H200).products.label for c in (8191, 8192, 16384, 131072, 131073)]
    assert labels == ["extrapolated", "measured", "measured", "measured", "extrapolated"]
    grouped = cost.shape_of(GROUPED)  # other contexts of the other stages
    one = [measured_rates(grouped, "pretrain", c, GPUS["h100"]).attention.label for c in (4096, 65536, 262144)]
    assert one == ["extrapolated", "measured on H200", "extrapolated"]
    for other in ({"moe_intermediate_size": 2048}, {"num_experts_per_tok": 8}, {"n_shared_experts": 1}):
        assert measured_rates(cost.shape_of(LITE | other), "adapt", 8192, H200) == TrainRates()
    more = measured_rates(cost.shape_of(LITE | {"n_routed_experts": 128}), "adapt", 8192, H200)
    assert more.products.share == at[8192] and more.products.label == more.attention.label == "extrapolated"
    assert measured_rates(lite, "adapt", 8192, GPUS["b200"]) == TrainRates()
    assert measured_rates(cost.shape_of(GROUPED), "adapt", 32768, H200).products == PEAK  # not measured


def test_time_by_hand() -> None:
    shape = cost.shape_of(SMALL)
    rates = TrainRates(products=Rate(0.4, "given"), attention=Rate(0.2, "given"), network=Rate(0.5, "given"))
    phases = (PhaseConfig(10, 4096, 8), PhaseConfig(5, 8192, 16, 2))
    found = planned(run(phases=phases), shape, rates=rates)
    seconds = 0.0
    for phase, made in zip(phases, found.phases, strict=True):
        parts, again = (
            cost.train_flops_parts(shape, "adapt", phase.context),
            cost.recomputed_flops(shape, "adapt", phase.context),
        )
        one = phase.sequences / 8 / 989.5e12
        compute = one * ((parts.products + again.products) / 0.4 + (parts.keys + again.keys) / 0.2)
        counts = cost.parameters(shape)
        # Embedding and head are gathered once, and head weights and the key norm too, but in twice the bytes.
        bytes_once = (2 * 2 + 4) * counts.total - 2 * 2 * 320 * 48
        network = bytes_once * 7 / 8 / (450e9 * 0.5) * (phase.sequences // (8 * phase.micro_batch))
        assert made.seconds == pytest.approx(max(compute, network), rel=1e-12)
        seconds += phase.steps * max(compute, network)
    assert found.seconds == pytest.approx(seconds) and found.gpu_hours == pytest.approx(8 * seconds / 3600)
    assert found.tokens == 10 * 8 * 4096 + 5 * 16 * 8192
    model = sum(p.steps * p.sequences * cost.train_flops(shape, "adapt", p.context) for p in phases)
    assert found.mfu == pytest.approx(model / (8 * 989.5e12 * seconds))


def test_parts_are_the_whole() -> None:
    shape = cost.shape_of(LITE)
    for stage, every in itertools.product(("pretrain", "warmup", "adapt"), (1, 4)):
        parts = cost.train_flops_parts(shape, stage, 8192, kl_every=every)
        assert sum(parts) == cost.train_flops(shape, stage, 8192, kl_every=every)
    again = cost.recomputed_flops(shape, "adapt", 8192)
    assert sum(again) == cost.forward_flops(shape, 8192, mode="mqa", logits=0)
    assert sum(cost.recomputed_flops(shape, "warmup", 8192)) == 0


def test_products_equal_torchs_counter() -> None:
    """Forward and backward of a model without experts under torch's FLOP counter. Its attention is not causal, and has
    six products: two forward and four backward.
    """
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    from tests.support import models

    tokens = 48
    config = models.config("v3", first_k_dense_replace=3, attn_implementation="eager")
    model = transformers.DeepseekV3ForCausalLM(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long)).logits.sum().backward()
    shape = cost.shape_of(config)
    attention = 3 * shape.layers * tokens**2 * cost.attention_flops_per_key(shape, "mha")
    products, keys = cost.train_flops_parts(shape, "pretrain", tokens)
    assert counter.get_total_flops() == products + attention
    assert keys == 3.5 * shape.layers * cost.visible_keys(tokens) * cost.attention_flops_per_key(shape, "mha")


# traffic


@pytest.mark.parametrize(("ranks", "warmup", "adapt"), [(2, 6144, 10240), (4, 9216, 15360)])
def test_keys_on_their_way_as_measured(ranks: int, warmup: int, adapt: int) -> None:
    """docs/results/training.md: KiB that a rank received in a layer over 8192 tokens, in float32."""
    for stage, kib in (("warmup", warmup), ("adapt", adapt)):
        model = run(stage, context=8192, sequences=1, context_parallel=ranks, activation_checkpointing=False)
        (keys,) = (t for t in planned(model, SMALL, ranks).phases[0].traffic if t.name.startswith("keys"))
        assert 2 * keys.bytes == kib * 1024  # a plan counts bfloat16


def test_recomputed_layers_gather_keys_again() -> None:
    model = run(context=8192, sequences=1, context_parallel=2)
    plain, again = (
        next(t.bytes for t in planned(c, SMALL, 2).phases[0].traffic if t.name.startswith("keys"))
        for c in (replace(model, activation_checkpointing=False), model)
    )
    assert again == 1.5 * plain  # forward, again, and gradients back


def test_layers_on_their_way_by_hand() -> None:
    """Gathered forward and backward in bfloat16, gradients scattered in float32, for each micro-batch; a warm-up has
    those of indexers. Embedding and head are gathered once, and so is, in float32, what is read in it.
    """
    counts = cost.parameters(cost.shape_of(SMALL))
    tables, exact = 2 * 320 * 48, 48 * 4 + 2 * 64
    (layers,) = planned(run(sequences=32), SMALL).phases[0].traffic
    gathered = 2 * 2 * (counts.total - tables - exact) + 2 * tables + 4 * exact
    assert layers.bytes == 4 * (gathered + 4 * counts.total) * 7 / 8 and layers.bandwidth == 450e9
    (layers,) = planned(run("warmup", sequences=32), SMALL, 16).phases[0].traffic
    gathered = 2 * (counts.total - exact) + 4 * exact
    assert layers.bytes == 2 * (gathered + 4 * counts.indexer) * 15 / 16 and layers.bandwidth == 8 * 50e9
    assert planned(run(), SMALL, 1).phases[0].traffic == ()


def test_offloaded_parts_by_hand() -> None:
    """They leave the GPU for its host, with the copy of a checkpoint. Each micro-batch moves weights and gradients.

    From the second one on a step waits for the gradients, and all its time is a lower bound.
    """
    kept, away = (planned(run(sequences=32, offload=offload), SMALL) for offload in (False, True))
    shape = cost.shape_of(SMALL)
    total, (layer,) = cost.parameters(shape).total, layer_parameters(shape)
    moving = 4 * layer.other // 8  # gradients that have been summed, on their way to the host
    assert kept.heaviest.bytes - away.heaviest.bytes == 16 * total // 8 - moving and kept.host == []
    assert sum(held.bytes for held in away.host) == 16 * total // 8 + 12 * total // 8
    assert {held.origin for held in away.host} == {"estimated"}
    moved, added = (t for t in away.phases[0].traffic if "host" in t.name)  # of four micro-batches
    once = 2 * 320 * 48 + 48 * 4 + 2 * 64  # tables, and what is read in float32
    assert moved.bytes == 4 * (4 * (2 * total - once) + total) / 8 and added.bytes == 4 * 3 * total / 8
    assert moved.bandwidth == added.bandwidth == 64e9
    assert away.phases[0].exchange.seconds == pytest.approx(
        kept.phases[0].exchange.seconds + moved.bytes / moved.bandwidth
    )
    *parts, waited = away.phases[0].parts
    assert tuple(parts) == kept.phases[0].parts and waited.seconds == added.bytes / added.bandwidth
    assert away.label == "roofline"
    one = planned(run(offload=True), SMALL)
    assert len(one.phases[0].parts) == 2 and one.label == "roofline"
    measured = planned(run(sequences=8, offload=True), LITE).phases[0]
    assert {part.label for part in measured.parts} == {"extrapolated"} and measured.label == "roofline"


def test_tokens_of_divided_experts_by_hand() -> None:
    # Of six copies; of two machines one is a token's own.
    for gpus, away, bandwidth in ((8, 6 * 7 / 8, 450e9), (16, 6 / 2, 50e9)):
        phase = planned(run(sequences=16, expert_parallel=gpus), LITE, gpus).phases[0]
        (tokens,) = (t for t in phase.traffic if t.name.startswith("tokens"))
        passes = 3 * 16 // gpus  # forward, again and backward
        assert tokens.bytes == pytest.approx(4096 * 27 * away * 2048 * 2 * 2 * passes)  # there and back
        assert tokens.bandwidth == bandwidth
        waited = phase.parts[2]  # for them, not beside the rest
        assert waited.seconds == tokens.bytes / bandwidth
        assert phase.exchange.bytes == pytest.approx(sum(t.bytes for t in phase.traffic) - tokens.bytes)


def test_divided_experts_on_their_way_by_hand() -> None:
    """Four GPUs share an expert: of one machine, or one on each of four, or two on each of two."""
    routed = 27 * 64 * 3 * 2048 * 1408
    others = cost.parameters(cost.shape_of(LITE)).total - routed
    tables = 2 * 102400 * 2048  # gathered once; routers and head weights too, in twice the bytes
    for gpus, experts, bandwidth in ((8, 2, 450e9), (32, 8, 50e9), (16, 4, 100e9)):
        traffic = planned(run(sequences=gpus, expert_parallel=experts), LITE, gpus).phases[0].traffic
        layers, own = traffic[:2]
        assert layers.bytes == pytest.approx((8 * others - 2 * tables) * (gpus - 1) / gpus)
        assert own.bytes == pytest.approx(8 * routed / experts * 3 / 4) and own.bandwidth == bandwidth
    layers, own = planned(run("warmup", sequences=32, expert_parallel=8), LITE, 32).phases[0].traffic[:2]
    assert own.bytes == pytest.approx(2 * routed / 8 * 3 / 4)  # gathered once, and nothing learns


# what is refused


def test_what_does_not_fit_says_what_would() -> None:
    lite = cost.shape_of(LITE)
    large = run(context=32768, sequences=16, activation_checkpointing=False)
    with pytest.raises(UserError, match="above all activations .* 126.9 GB of one H200") as refused:
        planned(large, lite)
    assert "what fits: --set activation_checkpointing=true" in str(refused.value)
    planned(replace(large, activation_checkpointing=True), lite)
    with pytest.raises(UserError, match="what fits: --set offload=true; or --gpus 8$"):
        planned(run(), lite, 2, "h100")
    planned(run(offload=True), lite, 2, "h100")
    planned(run(), lite, 8, "h100")
    phases = (PhaseConfig(1, 32768, 32, 4),)
    with pytest.raises(UserError, match=r"what fits: --set phases\.0\.micro_batch=1;") as refused:
        planned(run(phases=phases), lite, 8, "h100")
    planned(run(phases=(replace(phases[0], micro_batch=1),)), lite, 8, "h100")
    long = run(context=131072, sequences=16)
    with pytest.raises(UserError, match="what fits: --set context_parallel=2; or --gpus 16 --set context_parallel=2$"):
        planned(long, lite, 8, "h100")
    planned(replace(long, context_parallel=2), lite, 8, "h100")
    planned(replace(long, context_parallel=2), lite, 16, "h100")


def test_a_layer_that_no_gpu_holds() -> None:
    shape, long = published_shape(), {"context": 131072, "sequences": 480, "context_parallel": 32}
    planned(run("warmup", **long), shape, 1024, "b200")
    with pytest.raises(UserError, match="what fits: --set expert_parallel=2$"):
        planned(run("warmup", **long), shape, 1024, "h800")
    planned(run("warmup", **long, expert_parallel=2), shape, 1024, "h800")
    with pytest.raises(UserError, match="what fits: --set expert_parallel=4$"):
        planned(run(**long), shape, 1024, "h800")
    divided = planned(run(**long, expert_parallel=4), shape, 1024, "h800")
    assert divided.heaviest.bytes < usable(GPUS["h800"])
    dense = replace(shape, moe_layers=0, experts=0, dense_ffn=600_000)
    with pytest.raises(UserError, match=r"a layer of 13\.\d billion parameters is gathered whole, with the next one$"):
        planned(run(**long), dense, 1024, "h800")


REFUSALS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("--gpu MI350: training runs on CUDA devices; use one of H100", {}, {"gpu": "mi350"}),
    ("--gpus 0: give at least 1", {}, {"gpus": 0}),
    ("--gpus 12: no whole machines of 8", {}, {"gpus": 12}),
    ("device is cpu", {"device": "cpu"}, {}),
    ("no phases", {"phases": ()}, {}),
    ("offload keeps in the host's memory .*, and this is one; leave it out", {"offload": True}, {"gpus": 1}),
    ("needs a shape with an indexer", {}, {"dense": True}),
    ("expert_parallel is 3, which does not divide 8 ranks; make it a divisor", {"expert_parallel": 3}, {}),
    (
        "expert_parallel is 128, and the model has 64 routed experts; make it a divisor of them",
        {"expert_parallel": 128, "sequences": 128},
        {"gpus": 128},
    ),
    (
        "context_parallel is 16, which does not divide 8 ranks; .* --set context_parallel=1",
        {"context_parallel": 16},
        {},
    ),
    (
        "4 sequences a step do not divide into micro-batches of 1 on 8 groups .* --set context_parallel=2 would do",
        {"sequences": 4},
        {},
    ),
    (
        "16 ranks share sequences of a multiple of 128",
        {"context": 4032, "kl_every": 4, "sequences": 1},
        {"context": 16},
    ),
]


@pytest.mark.parametrize(("words", "changes", "more"), REFUSALS)
def test_refusals(words: str, changes: dict[str, Any], more: dict[str, Any]) -> None:
    shape, more = cost.shape_of(LITE), dict(more)
    if more.pop("dense", False):
        shape = cost.without_indexer(shape)
    if (context := more.pop("context", None)) is not None:  # the config itself would refuse it
        assert words.removeprefix("16 ") in (refusal(run("warmup", **changes), Ranks(16, context)) or "")
        return
    with pytest.raises(UserError, match=words):
        planned(run(**changes), shape, **more)


def test_experts_of_a_model_without_any() -> None:
    with pytest.raises(UserError, match="expert_parallel is 2, and the model has no routed experts; leave it out"):
        planned(run(expert_parallel=2), SMALL)


def test_training_refuses_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every division that a plan refuses, `divide` refuses in the same words, and no other."""
    axes = SimpleNamespace(get_local_rank=lambda name: 0, get_group=lambda name: None)
    monkeypatch.setattr(Mesh, "axes", lambda self, **sizes: axes)
    refused = 0
    for gpus, context, sequences, micro, experts in itertools.product(
        (1, 2, 4, 6, 8), (1, 2, 4), (2, 6, 8), (1, 2), (1, 4)
    ):
        phases = (PhaseConfig(1, 64, sequences, micro),)
        config = run(phases=phases, context_parallel=context, expert_parallel=experts)
        reason = None
        try:
            divide(config, Mesh(0, gpus, torch.device("cpu")))
        except UserError as error:
            reason = str(error)
        assert reason == refusal(config, Ranks(gpus, context, experts)), config
        refused += reason is not None
    assert 0 < refused < 180
