"""Unions of what neighbouring queries select.

Neighbouring queries select nearly the same keys. So a program takes a block of several queries, reads every key that
any of them selected once, and masks what a query did not select.

Legend: S queries, T keys, K selected; B queries of a block, C places of a block's list.

A block has a list of keys, ascending, and beside each key a mark: an int32 whose bit b says whether query b of the
block selected it. Wide blocks pay if selections overlap, and cost more than they save if they do not. So there are two
levels of blocks. A wide block whose union does not fit into its list is left to the narrow blocks of its queries, which
always have room. The device decides, and the host never waits: a block that another level takes has the count -1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.triton.masked import WORD, selection_bits

WIDE = 32  # queries of a wide block at most: the bits of a mark
FIT = 4  # a wide block's union may have so many times K keys
STRIP_BYTES = 2**31  # for bits, lists, and what else is kept of a strip's queries


@dataclass(frozen=True)
class Unions:
    """keys, marks (blocks, C) and counts (blocks), int32; B queries a block. What lies past a count is not defined."""

    keys: Tensor
    marks: Tensor
    counts: Tensor
    B: int

    @property
    def C(self) -> int:
        return self.keys.shape[1]

    def __len__(self) -> int:
        return self.counts.shape[0]

    def named(self) -> Tensor:
        """The keys, with -1 past a count."""
        places = torch.arange(self.C, device=self.keys.device)
        return torch.where(places < self.counts[:, None], self.keys, -1)


@triton.jit(do_not_specialize=["S", "T", "C"])
def _union_kernel(
    bits, firsts, ends, above, keys, marks, counts, S, T, C,
    B: tl.constexpr, BP: tl.constexpr, ABOVE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The list of one block of B queries. ABOVE: queries of a block of the level above, which comes first (0: none)."""
    block, n, b = tl.program_id(0), tl.arange(0, BT), tl.arange(0, BP)
    if ABOVE > 0:  # noqa: SIM102  a pointer that is None must not be read
        if tl.load(above + block * B // ABOVE) >= 0:
            tl.store(counts + block, -1)
            return
    mine = (b < B) & (block * B + b < S)
    first_B = tl.load(firsts + block * B + b, mask=mine, other=0)
    end_B = tl.load(ends + block * B + b, mask=mine, other=0)
    hi = tl.max(end_B)
    lo = tl.min(tl.where(end_B > first_B, first_B, hi))
    word, shift = bits + (block * B // WORD).to(tl.int64) * T, block * B % WORD
    place = block.to(tl.int64) * C
    count = 0
    for s in range(lo // BT * BT, hi, BT):
        mark = tl.load(word + s + n, mask=s + n < T, other=0) >> shift
        if B < WORD:
            mark = mark & ((1 << B) - 1)
        used = (mark != 0).to(tl.int32)
        at = count + tl.cumsum(used, 0) - 1
        kept = (used > 0) & (at < C)
        tl.store(keys + place + at, s + n, mask=kept)
        tl.store(marks + place + at, mark, mask=kept)
        count += tl.sum(used)
    tl.store(counts + block, tl.where(count <= C, count, -1))


def _level(bits, firsts, ends, above: Unions | None, B: int, C: int, S: int, T: int) -> Unions:
    blocks, device = triton.cdiv(S, B), bits.device
    keys, marks = (torch.empty(blocks, C, dtype=torch.int32, device=device) for _ in range(2))
    counts = torch.empty(blocks, dtype=torch.int32, device=device)
    _union_kernel[(blocks,)](
        bits, firsts, ends, None if above is None else above.counts, keys, marks, counts, S, T, C,
        B=B, BP=triton.next_power_of_2(B), ABOVE=0 if above is None else above.B, BT=1024, num_warps=4,
    )  # fmt: skip
    return Unions(keys, marks, counts, B)


def unions(indices_SK: Tensor, T: int, wide: int, narrow: int) -> list[Unions]:
    """Blocks of `wide` queries, and of `narrow` queries for those that do not fit. Both divide 32.

    indices_SK (S, K) int32, as in `tokensieve.ops`; what names none of the T keys counts for nothing.
    """
    S, K = indices_SK.shape
    bits, firsts, ends = selection_bits(indices_SK, T, by_key=True)
    fit, most = min(wide, FIT) * K, min(wide * K, T)
    levels = [_level(bits, firsts, ends, None, wide, max(1, min(fit, most)), S, T)]
    if fit < most:
        levels.append(_level(bits, firsts, ends, levels[0], narrow, min(narrow * K, T), S, T))
    return levels


def fitting(indices_SK: Tensor, T: int, B: int, most: int) -> Unions:
    """Blocks of B queries, as `unions` makes them. The count is -1 of those whose union has more than `most` keys."""
    S, K = indices_SK.shape
    return _level(*selection_bits(indices_SK, T, by_key=True), None, B, max(1, min(most, B * K, T)), S, T)


def strips(S: int, T: int, K: int, others: int = 0) -> Iterator[slice]:
    """All queries, in strips of whole blocks. others: bytes that the caller keeps for a query besides the lists."""
    row = T // 8 + 16 * K + others
    step = max(WIDE, STRIP_BYTES // max(1, row) // WIDE * WIDE)
    for first in range(0, S, step):
        yield slice(first, min(first + step, S))
