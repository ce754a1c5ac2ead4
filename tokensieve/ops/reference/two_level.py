"""Selection in two levels: equation (2) among the keys of the best blocks.

Legend: S query tokens, T key tokens, H index heads, D index width, P whole blocks of keys, B blocks that a query may
look into, K selected; b queries in a block of queries, n places in their range.

A query's candidates are its B blocks, in order of position. Their keys, one after the other, have the places
[0, B * block). Only the first and the last candidate can reach out of the query's range. So the keys in its range have
places [first, last) without a gap, in order of position: equation (2) selects among places as it does among positions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tokensieve.ops.quant import quantize_e4m3
from tokensieve.ops.reference.blocks import Block, compute_dtype, query_blocks
from tokensieve.ops.reference.index import (
    KEY_TILE,
    IndexInputs,
    index_topk,
    pad_index_inputs,
    padded,
    select_strip,
)


class Candidates(NamedTuple):
    """Blocks (S, B), ascending, then -1, and the places [first, last) (S) of the keys in a query's range. int32."""

    blocks_SB: Tensor
    firsts_S: Tensor
    lasts_S: Tensor


def block_means(k_TD: Tensor, k_scale_T: Tensor | None, block: int) -> tuple[Tensor, Tensor | None]:
    """The mean key of every whole block (P, D) in k's dtype, and the means' scales (P) if that is E4M3.

    Neighbours are added, pair by pair, so that a mean has the same bits however many keys there are. A mean that has to
    be quantized and is not finite gets NaN as its scale, and so every score of it is NaN.
    """
    P, dtype = k_TD.shape[0] // block, compute_dtype(k_TD)
    sums = k_TD[: P * block].to(dtype).unflatten(0, (P, block))
    if k_scale_T is not None:
        sums = sums * k_scale_T[: P * block].to(dtype).view(P, block, 1)
    while sums.shape[1] > 1:
        sums = sums[:, ::2] + sums[:, 1::2]
    means_PD = sums[:, 0] / block
    if k_TD.dtype != torch.float8_e4m3fn:
        return means_PD.to(k_TD.dtype), None
    broken_P = ~means_PD.isfinite().all(1)
    values, scales = quantize_e4m3(means_PD.masked_fill(broken_P[:, None], 0.0), k_TD.shape[1], "ue8m0")
    return values, scales[:, 0].masked_fill(broken_P, float("nan"))


def inner_blocks(starts_S: Tensor, ends_S: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The blocks [first, last) between that of a range's first key and that of its last."""
    return starts_S // block + 1, (ends_S - 1) // block


def candidates(best_SI: Tensor, starts_S: Tensor, ends_S: Tensor, block: int) -> Candidates:
    """The candidates of every query, given its best inner blocks (S, B - 2) int32, ascending, then -1."""
    first_S, last_S = starts_S // block, (ends_S - 1) // block
    at_S = (best_SI >= 0).sum(1) + (last_S > first_S)  # the last block's number among the candidates
    blocks_SB = torch.cat((first_S[:, None], best_SI, torch.full_like(first_S[:, None], -1)), 1).to(torch.int32)
    blocks_SB.scatter_(1, at_S[:, None], last_S[:, None].to(torch.int32))
    lasts_S = torch.where(ends_S > starts_S, (at_S - last_S) * block + ends_S, 0)
    return Candidates(blocks_SB, (starts_S - first_S * block).to(torch.int32), lasts_S.to(torch.int32))


def positions(places: Tensor, blocks: Tensor, block: int) -> Tensor:
    """Places (b, n) as positions on the key axis, int32; -1 stays. blocks (b, B)."""
    named = blocks.gather(1, places.clamp_min(0).long() // block)
    return torch.where(places < 0, -1, named * block + places % block).to(torch.int32)


def candidate_scores(x: IndexInputs, blocks_SB: Tensor, places: Block, block: int) -> Tensor:
    """Index scores (b, n) of queries for their candidates' keys at [places.lo, places.hi), in the bits of `index`."""
    a, b, lo, hi = places
    w_b1H, strips = x.w_SH[a:b, None, :], []
    for first in range(lo, hi, KEY_TILE):
        n = min(KEY_TILE, hi - first)
        place_n = torch.arange(first, first + padded(n), device=blocks_SB.device)
        within = (place_n // block).clamp_max(blocks_SB.shape[1] - 1)
        key_bn = blocks_SB[a:b, within].clamp_min(0) * block + place_n % block
        key_bn = key_bn.clamp_max(x.k_TD.shape[0] - 1)  # there are places of no key, at the end of the last block
        k_bnD = x.k_TD.index_select(0, key_bn.flatten()).unflatten(0, key_bn.shape)
        dots_bHn = torch.bmm(x.q_SHD[a:b], k_bnD.transpose(1, 2)).relu_()
        score_bn = torch.bmm(w_b1H, dots_bHn)[:, 0]
        strips.append((score_bn if x.k_scale_T is None else score_bn * x.k_scale_T[key_bn])[:, :n])
    return torch.cat(strips, 1)


def index_topk_blocks(
    q_SHD: Tensor,
    k_TD: Tensor,
    w_SH: Tensor,
    k: int,
    starts_S: Tensor,
    ends_S: Tensor,
    k_scale_T: Tensor | None,
    block: int,
    blocks: int,
) -> Tensor:
    (S, H, D), inner = q_SHD.shape, inner_blocks(starts_S, ends_S, block)
    if blocks > 2:
        means_PD, scale_P = block_means(k_TD, k_scale_T, block)
        best_SI = index_topk(q_SHD, means_PD, w_SH, blocks - 2, *inner, scale_P)
    else:
        best_SI = torch.empty(S, 0, dtype=torch.int32, device=q_SHD.device)
    blocks_SB, firsts_S, lasts_S = candidates(best_SI, starts_S, ends_S, block)
    x = pad_index_inputs(q_SHD, k_TD, w_SH, k_scale_T, ends_S)
    indices_SK = torch.full((S, k), -1, dtype=torch.int32, device=q_SHD.device)
    for places in query_blocks(firsts_S, lasts_S, lambda n: (D + H) * min(n, KEY_TILE) + n):
        chosen = select_strip(candidate_scores(x, blocks_SB, places, block), places, k, firsts_S, lasts_S)
        rows = slice(places.a, places.b)
        indices_SK[rows, : chosen.shape[1]] = positions(chosen, blocks_SB[rows], block)
    return indices_SK
