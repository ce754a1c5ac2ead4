"""The share of a GPU's bf16 peak that training reaches, as measured in this repository; 1 (a roofline) elsewhere.

Two kinds of measurements, both on one H200. A whole step gives one share for all of it. The attention of a layer, with
index scores and the indexers' loss, gives that of what grows with the keys; products with weights then are a roofline.

Seconds are those of the pages that each row names, FLOPs those of `train_flops_parts`, so that a share is always that
of the FLOPs that a plan counts. Between measured contexts shares are interpolated in the logarithm of the context.
Beyond them the nearest one is taken, and labelled "extrapolated".

The steps had random weights, gradients and moments in bfloat16. A run of `tokensieve/train` has float32 ones, copies
for autocast in every micro-batch, and AdamW in float32. Its time was not measured at this size.
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
        """Whether its attention is that of `shape`, and for a step its layers too: width, and experts, by size and
        number. The number of index heads, depth and vocabulary may differ: their FLOPs are counted.
        """
        return _attends(self.shape) == _attends(shape) and (not self.step or _layer(self.shape) == _layer(shape))


def _attends(shape: Shape) -> tuple[int, int, int]:
    return shape.attention.heads, shape.attention.gathered, shape.attention.cached


def _layer(shape: Shape) -> tuple[int, ...]:
    return shape.hidden, shape.expert_ffn, shape.experts, shape.experts_per_token, shape.shared_experts


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

    def stack(stage: Stage, **speeds: float) -> list[Measured]:
        """speeds: tokens a second by context and layers, as in k8_20 for 8192 tokens in 20 layers."""
        sizes = [(int(k) * 1024, int(n), v) for key, v in speeds.items() for k, n in [key[1:].split("_")]]
        return [Measured(_layers(lite, n), stage, c, c / v, True, STACK) for c, n, v in sizes]

    def attention(shape: Shape, stage: Stage, source: str, **ms: float) -> list[Measured]:
        """ms: milliseconds by context, as in k32 for 32768 tokens."""
        return [Measured(shape, stage, int(k[1:]) * 1024, t / 1e3, False, source) for k, t in ms.items()]

    return (
        *stack("pretrain", k8_20=13794, k32_20=9442, k128_8=8325),
        *stack("warmup", k8_20=30922, k32_20=17459, k128_8=13793),
        *stack("adapt", k8_20=6644, k32_20=6442, k128_8=12378),
        *attention(latent, "pretrain", KERNELS, k32=302.1, k128=4958),
        # The warm-up's step is what it takes beyond the dense forward pass.
        *attention(latent, "warmup", KERNELS, k8=4.862 + 25.129, k32=73.6 + 206.3, k128=1280 + 2965),
        *attention(latent, "adapt", KERNELS, k32=228.7, k128=1186),
        *attention(grouped, "pretrain", FEW_HEADS, k32=55.5, k64=224.1, k128=908.8),
        *attention(grouped, "adapt", FEW_HEADS, k32=52.5, k64=121.3, k128=306.6),
    )


def measured_rates(shape: Shape, stage: Stage, context: int, gpu: Gpu) -> TrainRates:
    """The shares of a stage on sequences of `context` tokens; 1 for what was not measured."""
    rows = [m for m in measurements() if m.stage == stage and m.describes(shape)] if gpu.hopper else []
    steps = [m for m in rows if m.step]
    if not rows:
        return TrainRates()
    used = steps or rows
    label: Label = "measured" if gpu == MEASURED_ON else "measured on H200"
    if not min(m.context for m in used) <= context <= max(m.context for m in used):
        label = "extrapolated"
    rate = Rate(_at(used, context), label, used[0].source)
    return TrainRates(products=rate if steps else PEAK, attention=rate)


def _at(rows: Sequence[Measured], context: int) -> float:
    """The share at a context."""
    known = sorted((math.log2(m.context), m.share()) for m in rows)
    x = min(max(math.log2(context), known[0][0]), known[-1][0])
    for (x0, y0), (x1, y1) in pairwise(known):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return known[-1][1]
