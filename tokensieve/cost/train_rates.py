"""The share of a GPU's bf16 peak that training reaches, as measured in this repository; 1 (a roofline) elsewhere.

Two kinds of measurements, both on H200s. A whole step gives one share for all of it. The attention of a layer, with
index scores and the indexers' loss, gives that of what grows with the keys, at lengths and for shapes without a step;
products with weights are a roofline if no step was measured at all.

Seconds are those of the pages that each row names, FLOPs those of `train_flops_parts`, so that a share is always that
of the FLOPs that a plan counts. Between measured contexts shares are interpolated in the logarithm of the context.
Beyond them the nearest one is taken, and labelled "extrapolated". So are steps of a model with another number of
experts: its FLOPs are the same, but an expert gets more of the tokens or fewer.

The steps are those of `tokensieve/train`, with float32 weights, gradients and moments, but for 8192 tokens, where these
were in bfloat16. Tokens and weights were random, and so were the selected keys, which is the worst case. Of grouped
attention, where it counts most, only the attention to selections like those of real text stands for adaptation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

from tokensieve.cost.gpus import GPUS, Gpu
from tokensieve.cost.paper import published_shape
from tokensieve.cost.rates import PEAK, Label, Rate
from tokensieve.cost.shape import Shape, shape_of
from tokensieve.cost.training import Stage, recomputed_flops, train_flops_parts

MEASURED_ON = GPUS["h200"]
KERNELS = "docs/kernels.md, a layer"
FEW_HEADS = "docs/kernels.md, few heads to a group, near selections (diffuse ones take 3 to 4 times as long)"
STACK = "docs/results/training.md, speed and memory of a 16B-class stack"
STEP = "docs/plan.md, planned and measured"


@dataclass(frozen=True)
class TrainRates:
    """Shares of a peak. products: with weights, of the bf16 peak. attention: the same for all that grows with the keys,
    index scores and the indexers' loss included. network: between GPUs.
    """

    products: Rate = PEAK
    attention: Rate = PEAK
    network: Rate = PEAK


@dataclass(frozen=True)
class Measured:
    """Seconds of one sequence of `context` tokens in one layer's attention, or in a step that recomputes its layers."""

    shape: Shape
    stage: Stage
    context: int
    seconds: float
    step: bool
    source: str

    def share(self) -> float:
        flops = train_flops_parts(self.shape, self.stage, self.context)
        if not self.step:
            return flops.keys / self.seconds / MEASURED_ON.bf16
        again = recomputed_flops(self.shape, self.stage, self.context)
        return (sum(flops) + sum(again)) / self.seconds / MEASURED_ON.bf16

    def describes(self, shape: Shape) -> bool:
        """Whether its attention is that of `shape`, and for a step its layers too: width, size of experts, and how many
        of them a token has. The number of index heads and of experts, depth and vocabulary may differ: their FLOPs are
        counted.
        """
        return _attends(self.shape) == _attends(shape) and (not self.step or _layer(self.shape) == _layer(shape))


def _attends(shape: Shape) -> tuple[int, int, int]:
    return shape.attention.heads, shape.attention.gathered, shape.attention.cached


def _layer(shape: Shape) -> tuple[int, ...]:
    return shape.hidden, shape.expert_ffn, shape.experts_per_token, shape.shared_experts


def _layers(shape: Shape, count: int) -> Shape:
    """The shape with so many layers, all alike."""
    return replace(shape, layers=count, moe_layers=count if shape.experts else 0, index_layers=count)


# DeepSeek-V2-Lite with indexers, and the layers of Qwen3-8B.
LITE = {
    "model_type": "deepseek_v32",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 0,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "index_n_heads": 16,
    "index_head_dim": 128,
    "index_topk": 2048,
}
GROUPED = {
    "model_type": "qwen3_dsa",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "index_n_heads": 16,
    "index_head_dim": 128,
    "index_topk": 2048,
}


@cache
def measurements() -> tuple[Measured, ...]:
    lite, grouped, latent = shape_of(LITE), _layers(shape_of(GROUPED), 1), _layers(published_shape(), 1)
    # The stacks of benchmarks/many_gpus.py. When it ran, lite's queries were compressed, which V2-Lite's are not.
    lite_4 = _layers(shape_of(LITE | {"q_lora_rank": 1536}), 4)
    grouped_4 = replace(_layers(grouped, 4), vocabulary=16384)
    v3 = replace(published_shape(), layers=2, moe_layers=1, index_layers=2, experts=32, vocabulary=16384)

    def rows(shape: Shape, stage: Stage, step: bool, source: str, **seconds: float) -> list[Measured]:
        """seconds: by context, as in k32 for 32768 tokens."""
        return [Measured(shape, stage, int(k[1:]) * 1024, t, step, source) for k, t in seconds.items()]

    return (
        *rows(_layers(lite, 20), "pretrain", True, STACK, k8=8192 / 13794),
        *rows(_layers(lite, 20), "warmup", True, STACK, k8=8192 / 30922),
        *rows(_layers(lite, 20), "adapt", True, STACK, k8=8192 / 6644),
        *rows(lite_4, "pretrain", True, STEP, k32=0.8437, k128=8.125),
        *rows(lite_4, "warmup", True, STEP, k32=0.3619, k128=4.487),
        *rows(lite_4, "adapt", True, STEP, k32=1.1757, k128=5.740),
        *rows(v3, "pretrain", True, STEP, k32=2.318),
        *rows(v3, "warmup", True, STEP, k32=0.9273, k128=12.022),
        # 128K tokens are too many for one GPU: the time of two that share them, for one alone.
        *rows(v3, "adapt", True, STEP, k32=1.3635, k128=2 * 3.228),
        *rows(grouped_4, "warmup", True, STEP, k32=0.4438, k128=5.330),
        *rows(latent, "pretrain", False, KERNELS, k32=0.3021, k128=4.958),
        # The warm-up's step is what it takes beyond the dense forward pass.
        *rows(latent, "warmup", False, KERNELS, k8=0.029991, k32=0.0736 + 0.2063, k128=1.280 + 2.965),
        *rows(latent, "adapt", False, KERNELS, k32=0.2287, k128=1.186),
        *rows(grouped, "pretrain", False, FEW_HEADS, k32=0.0555, k64=0.2241, k128=0.9088),
        *rows(grouped, "adapt", False, FEW_HEADS, k32=0.0525, k64=0.1213, k128=0.3066),
    )


def measured_rates(shape: Shape, stage: Stage, context: int, gpu: Gpu) -> TrainRates:
    """The shares of a stage on sequences of `context` tokens; 1 for what was not measured."""
    rows = [m for m in measurements() if m.stage == stage and m.describes(shape)] if gpu.hopper else []
    steps = [m for m in rows if m.step]
    known = {m.context for m in steps}
    attention = steps + [m for m in rows if m.context not in known]
    return TrainRates(_rate(steps, shape, context, gpu), _rate(attention, shape, context, gpu))


def _rate(rows: Sequence[Measured], shape: Shape, context: int, gpu: Gpu) -> Rate:
    if not rows:
        return PEAK
    label: Label = "measured" if gpu == MEASURED_ON else "measured on H200"
    between = min(m.context for m in rows) <= context <= max(m.context for m in rows)
    if not between or any(m.step and m.shape.experts != shape.experts for m in rows):
        label = "extrapolated"
    return Rate(_at(rows, context), label, rows[0].source)


def _at(rows: Sequence[Measured], context: int) -> float:
    """The share at a context."""
    known = sorted((math.log2(m.context), m.share()) for m in rows)
    x = min(max(math.log2(context), known[0][0]), known[-1][0])
    for (x0, y0), (x1, y1) in pairwise(known):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return known[-1][1]
