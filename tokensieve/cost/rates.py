"""The share of a GPU's peak that each operation reaches: measured if docs hold a measurement, else 1 (roofline).

Every share has a label that its figures carry: "measured" on this very GPU, "measured on H200" for other Hoppers, on
which the same kernels run, "extrapolated" from shorter or longer sequences that were measured, in training also from
another number of experts, "roofline" for a peak that nothing reaches in full, "fitted" and "given".
"""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, TypeVar

from tokensieve.config import UserError
from tokensieve.cost.serving import Serving
from tokensieve.cost.shape import Shape

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Label = Literal["measured", "measured on H200", "extrapolated", "roofline", "fitted", "given"]


@dataclass(frozen=True)
class Rate:
    """A share of a peak, above 0 and at most 1, and its origin. UserError for any other share."""

    share: float
    label: Label
    source: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"{self.share} is not a share of a peak; give one above 0 and at most 1")


PEAK = Rate(1.0, "roofline")


@dataclass(frozen=True)
class Rates:
    """Shares of the peak, by operation.

    products: products with weights, of the FP8 or the bf16 peak, as the weights are. index: index scores, of the
    indexer's peak. selection: reading scores to find the top k, of the memory's bandwidth. dense, dense_decode:
    attention to every key, of the bf16 peak, in prefill and decode. selected, selected_decode: attention to gathered
    entries. masked: attention to every key with those masked that are not selected, counted over every key. memory:
    reading weights and cache. network: between GPUs.
    """

    products: Rate = PEAK
    index: Rate = PEAK
    selection: Rate = PEAK
    dense: Rate = PEAK
    dense_decode: Rate = PEAK
    selected: Rate = PEAK
    selected_decode: Rate = PEAK
    masked: Rate = PEAK
    memory: Rate = PEAK
    network: Rate = PEAK


ROOFLINE = Rates()


def _measured(share: float, source: str) -> Rate:
    return Rate(share, "measured", source)


_MEMORY = _measured(3.831e12 / 4.8e12, "docs/kernels.md: FP8 index scores from pages, 128 x 32K, 3831 GB/s")

# On one H200, against its peaks: 1979 (FP8) and 989.5 (bf16) TFLOP/s, 4.8 TB/s.
LATENT_128 = Rates(
    products=_measured(0.30, "docs/results/serving.md: prefill in FP8 blocks, about 2 of 5.1 us a token and layer"),
    index=_measured(989 / 1979, "docs/kernels.md: FP8 index scores, 4096 x 128K, 989 TFLOP/s"),
    selection=_measured(1.740e12 / 4.8e12, "docs/kernels.md: top-2048, 1024 x 128K, 1740 GB/s"),
    dense=_measured(584 / 989.5, "docs/kernels.md: cuDNN in a chunk of 8192 queries, 584 TFLOP/s"),
    dense_decode=_measured(571.8 / 989.5, "docs/results/serving.md: decode attention alone, 64 x 128K, 4086 us"),
    selected=_measured(569 / 989.5, "docs/kernels.md: sparse forward as auto has it, 4096 x 32K, 569 TFLOP/s"),
    selected_decode=_measured(392 / 989.5, "docs/kernels.md: sparse decode through FlashMLA, 128 x 32K, 392 TFLOP/s"),
    masked=_measured(366.7 / 989.5, "docs/kernels.md: masked attention, forward, 8K tokens, 7.497 ms"),
    memory=_MEMORY,
)
GROUPED_32 = Rates(
    index=_measured(306 / 989.5, "docs/kernels.md: few heads, 16 x 128 in bf16, index and selection 28.9 ms at 64K"),
    dense=_measured(
        550 / 989.5, "docs/kernels.md: few heads, cuDNN both ways 224.1 ms at 64K, 3.5 times the forward's FLOPs"
    ),
    selected=_measured(77.5 / 989.5, "docs/kernels.md: few heads, 32 heads in 8 groups, near, forward 27.9 ms at 64K"),
    memory=_MEMORY,
)
OTHERS = Rates(memory=_MEMORY)


def known_rates(serving: Serving, shape: Shape) -> Rates:
    """The shares that were measured for such a model served so; 1 for the others.

    Attention is measured for latent attention with 128 heads, and for 32 heads in 8 groups, 128 wide; products with FP8
    weights; index scores in FP8 for the first and in bf16 for the second, and not in two levels.
    """
    if not serving.gpu.hopper:
        return ROOFLINE
    attention = shape.attention
    rates, index = OTHERS, None
    if (attention.heads, attention.gathered, attention.cached) == (128, 1088, 576):
        rates, index = LATENT_128, "fp8"
    elif (attention.heads, attention.gathered, attention.cached) == (32, 256, 2048):
        rates, index = GROUPED_32, "bf16"
    if serving.index != index or serving.two_level:
        rates = replace(rates, index=PEAK)
    if serving.weights != "fp8":
        rates = replace(rates, products=PEAK)
    if serving.gpu.name == "H200":
        return rates
    moved = {f.name: getattr(rates, f.name) for f in fields(rates)}
    return Rates(**{k: replace(r, label="measured on H200") if r.label == "measured" else r for k, r in moved.items()})


R = TypeVar("R", bound="DataclassInstance")


def given_rates(rates: R, changes: list[str]) -> R:
    """`rates` with those that `NAME=SHARE` names. UserError for an unknown name, and for what is not a share."""
    names = [f.name for f in fields(rates)]
    for change in changes:
        name, _, text = change.partition("=")
        if name not in names:
            raise UserError(f"--rate {change}: write NAME=SHARE with a name of {', '.join(names)}")
        try:
            share = float(text)
        except ValueError as error:
            raise UserError(f"--rate {change}: {text!r} is not a number; give a share such as 0.4") from error
        rates = replace(rates, **{name: Rate(share, "given")})
    return rates
