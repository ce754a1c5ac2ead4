"""Figure 3 of the DeepSeek-V3.2-Exp report: dollars per million tokens against token position, on H800s.

Four shares are fitted, one set for all curves. Everything else is published or measured: the deployment's layout and
contexts (DeepSeek's inference system overview, open-infra-index, 2025-03-01), its drafted tokens (arXiv 2412.19437,
section 5.4.3), and shares that were measured on an H200.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

from tokensieve.cost.gpus import GPUS
from tokensieve.cost.rates import Rate, Rates, known_rates
from tokensieve.cost.serving import Serving
from tokensieve.cost.shape import Shape, shape_of, without_indexer
from tokensieve.cost.token_cost import TokenCost, decode_cost, prefill_cost
from tokensieve.families import FAMILIES

PRICE = 2.0  # dollars a GPU hour
POSITIONS = (32768, 65536, 98304, 131072)

# Read off the plot, at POSITIONS.
FIGURE_3: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "prefill_dense": (0.205, 0.36, 0.515, 0.665),
        "prefill_sparse": (0.118, 0.14, 0.165, 0.19),
        "decode_dense": (0.60, 1.13, 1.66, 2.18),
        "decode_sparse": (0.175, 0.20, 0.225, 0.25),
    }
)
# The prices of DeepSeek's API with V3.2-Exp, as shares of those before.
PRICE_CUT: Mapping[str, float] = MappingProxyType({"input": 0.5, "output": 0.25})


@dataclass(frozen=True)
class Parameter:
    """A fitted share of a peak, the operations that reach it, and the reason why it is plausible."""

    value: float
    operations: tuple[str, ...]
    reason: str


PARAMETERS: Mapping[str, Parameter] = MappingProxyType(
    {
        "products": Parameter(
            0.35, ("products",), "products with weights, of the FP8 peak; 0.30 measured in our prefill on an H200"
        ),
        "dense_attention": Parameter(
            0.63,
            ("dense", "dense_decode"),
            "attention to every key, of the bf16 peak; 0.59 (prefill) and 0.58 (decode) measured on an H200",
        ),
        "selected_prefill": Parameter(
            0.51,
            ("selected", "masked"),
            "attention to selected keys in prefill, of the bf16 peak; measured: 0.58 gathered, 0.37 masked",
        ),
        "selected_decode": Parameter(
            0.35, ("selected_decode",), "attention to selected keys in decode, of the bf16 peak; 0.40 measured"
        ),
    }
)

H800 = GPUS["h800"]
PREFILL = Serving(H800, gpus=32)
DECODE = Serving(H800, gpus=144, mean_context=4989, draft=1, acceptance=0.85)


@cache
def published_shape() -> Shape:
    """The 671B model with its indexers."""
    return shape_of(FAMILIES["deepseek_v32"].config())


def paper_rates() -> Rates:
    """The fitted shares, and for the other operations those measured on an H200."""
    fitted = {op: Rate(p.value, "fitted") for p in PARAMETERS.values() for op in p.operations}
    return replace(known_rates(PREFILL, published_shape()), **fitted)


def paper_cost(curve: str, position: int, rates: Rates | None = None) -> TokenCost:
    """A token of one of the curves of `FIGURE_3`. rates: other shares than the fitted ones.

    Dense attention decodes from bf16 entries, for which its kernel is made, sparse attention from FP8 ones.
    """
    phase, attention = curve.split("_")
    shape, rates = published_shape(), rates or paper_rates()
    shape = shape if attention == "sparse" else without_indexer(shape)
    if phase == "prefill":
        return prefill_cost(shape, PREFILL, rates, position)
    return decode_cost(shape, DECODE if shape.sparse else replace(DECODE, cache="bf16"), rates, position)
