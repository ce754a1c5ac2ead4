"""The model of time with measured shares, beside what our engine took on an H200 (docs/results/serving.md)."""

from dataclasses import replace

import pytest

from tokensieve import cost
from tokensieve.cost.paper import published_shape

# Six layers of the 671B model, one of them without experts, on one GPU.
SPARSE = replace(published_shape(), layers=6, moe_layers=5, index_layers=6)
DENSE = cost.without_indexer(SPARSE)

# requests, context, milliseconds of a step: DSA, dense
DECODE = [
    (16, 8192, 9.6, 10.1),
    (64, 8192, 17.8, 20.7),
    (16, 32768, 9.9, 13.0),
    (64, 32768, 18.3, 31.9),
    (16, 130000, 10.2, 17.2),
    (64, 130000, 20.0, 50.0),
]
# tokens of a prompt, seconds of its last chunk of 8192: DSA, dense
PREFILL = [(32768, 0.213, 0.352), (131072, 0.315, 1.037)]

# A roofline leaves out small kernels, launches, and in dense decode that our engine reads quantized pages, for which
# attention takes 1.2 to 1.4 times as long as the kernel whose share this is.
LEAST = 0.6


def check(sparse: float, dense: float, measured: tuple[float, float]) -> None:
    assert LEAST < sparse / measured[0] < 1 and LEAST < dense / measured[1] < 1
    assert dense / sparse == pytest.approx(measured[1] / measured[0], rel=0.25)


@pytest.mark.parametrize(("requests", "context", "sparse", "dense"), DECODE)
def test_decode(requests: int, context: int, sparse: float, dense: float) -> None:
    serving = cost.Serving(cost.gpu_of("H200"), gpus=1, batch=requests)
    rates = cost.known_rates(serving, SPARSE)
    ms = [1e3 * requests * cost.decode_cost(shape, serving, rates, context).seconds for shape in (SPARSE, DENSE)]
    check(ms[0], ms[1], (sparse, dense))


@pytest.mark.parametrize(("tokens", "sparse", "dense"), PREFILL)
def test_prefill(tokens: int, sparse: float, dense: float) -> None:
    serving = cost.Serving(cost.gpu_of("H200"), gpus=1)
    rates = cost.known_rates(serving, SPARSE)
    middle = tokens - serving.chunk // 2  # of the last chunk
    seconds = [serving.chunk * cost.prefill_cost(s, serving, rates, middle).seconds for s in (SPARSE, DENSE)]
    check(seconds[0], seconds[1], (sparse, dense))
