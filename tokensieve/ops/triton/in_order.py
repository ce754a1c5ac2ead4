"""Sums in a fixed order, the deterministic mode of backward.

Several queries select the same key, and each contributes to that key's gradient. Added atomically, the contributions
come in whatever order the programs run, and float32 sums differ in their last bits from run to run. With
`torch.use_deterministic_algorithms(True)` every contribution is written to its own row instead, and rows of one key are
added in the order of their queries.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

STRIP_BYTES = 2**30


def wanted_in_order() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def strip_length(S: int, row_bytes: int) -> int:
    """Queries of a strip: as many as STRIP_BYTES hold if one needs `row_bytes`."""
    return max(1, min(S, STRIP_BYTES // max(1, row_bytes)))


def strips(S: int, row_bytes: int) -> Iterator[slice]:
    """All queries, as many at a time as STRIP_BYTES hold if one needs `row_bytes`."""
    step = strip_length(S, row_bytes)
    for first in range(0, S, step):
        yield slice(first, min(first + step, S))


@triton.jit
def _sum_kernel(rows, order, ends, sums, W: tl.constexpr, WP: tl.constexpr):
    """sums[s] += the rows that name key s, one after the other."""
    s, w = tl.program_id(0).to(tl.int64), tl.arange(0, WP)
    begin = tl.load(ends + s - 1, mask=s > 0, other=0)
    sum = tl.load(sums + s * W + w, mask=w < W, other=0.0)
    for i in range(begin, tl.load(ends + s)):
        sum += tl.load(rows + tl.load(order + i) * W + w, mask=w < W, other=0.0)
    tl.store(sums + s * W + w, sum, mask=w < W)


def add_in_order(sums_TW: Tensor, indices_SK: Tensor, rows_NW: Tensor) -> None:
    """Adds the row of every place (N = S * K rows, float32) to its key's row of sums (T, W) float32, in place.

    Places that name none of the T keys add nothing. All contiguous.
    """
    T, W = sums_TW.shape
    if T == 0:
        return
    keys = indices_SK.flatten()
    keys = torch.where((keys >= 0) & (keys < T), keys, T)
    order = keys.argsort(stable=True)
    ends = torch.searchsorted(keys[order], torch.arange(T, device=keys.device, dtype=keys.dtype), right=True)
    _sum_kernel[(T,)](rows_NW, order, ends, sums_TW, W=W, WP=triton.next_power_of_2(W))
