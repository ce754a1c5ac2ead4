"""How the reference walks over a packed batch: blocks of queries, tiles of keys, nothing of size heads x S x T.

Legend: S query tokens, T key tokens, H heads; b queries in a block, n keys in its range. Everything in this package is
computed in float32 (float64 for float64 inputs) whatever the inputs' dtype.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CPU_ELEMENTS = 1 << 20  # elements of the largest temporary: 4 MiB in float32, about what stays in a core's cache
GPU_ELEMENTS = 1 << 26  # 256 MiB in float32: enough work per launch


class Block(NamedTuple):
    """Queries [a, b) of one document, which see keys within [lo, hi)."""

    a: int
    b: int
    lo: int
    hi: int


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def block_elements(x: Tensor) -> int:
    return CPU_ELEMENTS if x.device.type == "cpu" else GPU_ELEMENTS


def query_blocks(starts_S: Tensor, ends_S: Tensor, elements_per_query: Callable[[int], int]) -> Iterator[Block]:
    """Blocks of consecutive queries with the same `start`, so that one key range serves the block.

    Queries without keys are left out. `elements_per_query(n)` is the size of the caller's largest temporary for one
    query that sees n keys.
    """
    limit = block_elements(starts_S)
    starts, ends = starts_S.tolist(), ends_S.tolist()
    S, a = len(starts), 0
    while a < S:
        lo, hi, b = starts[a], ends[a], a + 1
        if hi <= lo:
            a += 1
            continue
        while b < S and starts[b] == lo and ends[b] > lo:
            wider = max(hi, ends[b])
            if (b + 1 - a) * elements_per_query(wider - lo) > limit:
                break
            hi, b = wider, b + 1
        yield Block(a, b, lo, hi)
        a = b


def row_blocks(S: int, elements_per_row: int, like: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges [a, b) of rows that hold at most a block's elements on the device of `like`."""
    rows = max(1, block_elements(like) // max(1, elements_per_row))
    for a in range(0, S, rows):
        yield a, min(a + rows, S)


def out_of_range(block: Block, starts_S: Tensor, ends_S: Tensor) -> Tensor | None:
    """Mask (b, hi-lo), True for a key outside a query's own range; None for one query, whose block is its range."""
    if block.b - block.a == 1:
        return None
    starts, ends = starts_S[block.a : block.b, None], ends_S[block.a : block.b, None]
    position = torch.arange(block.lo, block.hi, device=starts.device, dtype=starts.dtype)
    return (position < starts) | (position >= ends)


def softmax_with_lse(logits: Tensor) -> tuple[Tensor, Tensor]:
    """softmax over the last axis, in the logits' place, and logsumexp.

    A query without keys, whose logits are -inf, gets zeros and -inf.
    """
    # Not exp(logits - lse): at logits of 1e4 lse has too few digits left.
    largest = logits.amax(dim=-1, keepdim=True).clamp_min_(torch.finfo(logits.dtype).min)
    p = logits.sub_(largest).exp_()
    total = p.sum(dim=-1, keepdim=True)  # at least 1, the largest's own share, or 0
    lse = total.log().add_(largest).squeeze(-1)
    return p.div_(total.clamp_min_(1)), lse


def normalized(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse) over the last axis; zeros if lse is -inf (a query without keys)."""
    return torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
