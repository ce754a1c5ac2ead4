"""The lightning indexer, equation (1), and the selection, equation (2).

Legend: S query tokens, T key tokens, H index heads, D index width; b queries in a block, n keys in its range.

An index score has the same bits whatever the blocking, the batch, and prefill or decode. A matrix product gives each
output element the same sum over the width in the same order as long as the library takes its ordinary kernel, and the
library leaves that kernel for very few rows or columns. So every score is computed as one product per query, of heads
padded to HEAD_PAD x keys padded to KEY_PAD.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokensieve.ops.reference.blocks import Block, compute_dtype, out_of_range, query_blocks

KEY_TILE = 1920  # keys scored at a time
TILE_PRODUCTS = 1 << 18  # heads x keys: in decode a tile may be longer, up to this many products (1 MiB in float32)
KEY_PAD = 192  # keys per product are padded to a multiple of this
HEAD_PAD = 4  # heads likewise


class IndexInputs(NamedTuple):
    """q (S, H', D), k (T', D), w (S, H') in the computing dtype, padded so that every product has an ordinary shape."""

    q_SHD: Tensor
    k_TD: Tensor
    w_SH: Tensor
    k_scale_T: Tensor | None


def pad_index_inputs(
    q_SHD: Tensor, k_TD: Tensor, w_SH: Tensor, k_scale_T: Tensor | None, ends_S: Tensor
) -> IndexInputs:
    dtype = compute_dtype(q_SHD)
    q, k, w = q_SHD.to(dtype), k_TD.to(dtype), w_SH.to(dtype)
    heads = -q.shape[1] % HEAD_PAD
    if heads:
        q, w = F.pad(q, (0, 0, 0, heads)), F.pad(w, (0, heads))
    # A tile may start at any key and is padded at its end: it needs KEY_PAD - 1 rows past the last key that is read. A
    # cache buffer usually has them as unused capacity; otherwise the keys are copied.
    last = max(ends_S.tolist(), default=0)
    missing = last + KEY_PAD - k.shape[0]
    if missing > 0:
        k = F.pad(k, (0, 0, 0, missing))
    scale = None if k_scale_T is None else F.pad(k_scale_T.to(dtype), (0, k.shape[0] - k_scale_T.shape[0]))
    return IndexInputs(q.contiguous(), k.contiguous(), w.contiguous(), scale)


def padded(keys: int) -> int:
    return -(-keys // KEY_PAD) * KEY_PAD


def head_products(x: IndexInputs, a: int, b: int, lo: int, hi: int) -> Tensor:
    """q . k for queries [a, b) and keys [lo, lo + padded length): (b, H', n'), n' >= hi - lo."""
    k_nD = x.k_TD[lo : lo + padded(hi - lo)]
    return torch.bmm(x.q_SHD[a:b], k_nD.t().expand(b - a, -1, -1))


def score_strip(x: IndexInputs, block: Block) -> Tensor:
    """Index scores (b, hi-lo) of one block of queries over its key range, a tile of keys at a time."""
    a, b, lo, hi = block
    q_bHD, w_b1H, k_bDT = x.q_SHD[a:b], x.w_SH[a:b, None, :], x.k_TD.t().expand(b - a, -1, -1)
    tile = max(KEY_TILE, TILE_PRODUCTS // (q_bHD.shape[0] * q_bHD.shape[1]) // KEY_PAD * KEY_PAD)
    tiles = []
    for first in range(lo, hi, tile):
        # In decode a tile is so little work that views cost as much as products: one view a tile.
        dots = torch.bmm(q_bHD, k_bDT.narrow(2, first, padded(min(tile, hi - first))))
        tiles.append(torch.bmm(w_b1H, dots.relu_()))
    strip_bn = (tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=2))[:, 0, : hi - lo]
    return strip_bn if x.k_scale_T is None else strip_bn * x.k_scale_T[lo:hi]


def score_elements(H: int):
    """Elements held per query that sees n keys: its strip of scores, or a tile of all heads."""
    return lambda n: max(n, H * min(n, KEY_TILE))


def index_scores(
    q_SHD: Tensor, k_TD: Tensor, w_SH: Tensor, starts_S: Tensor, ends_S: Tensor, k_scale_T: Tensor | None
) -> Tensor:
    x = pad_index_inputs(q_SHD, k_TD, w_SH, k_scale_T, ends_S)
    scores_ST = x.q_SHD.new_full((q_SHD.shape[0], k_TD.shape[0]), float("-inf"))
    for block in query_blocks(starts_S, ends_S, score_elements(q_SHD.shape[1])):
        scores_ST[block.a : block.b, block.lo : block.hi] = score_strip(x, block)
    return scores_ST


def accumulate_index_gradient(
    x: IndexInputs, block: Block, dscore_bn: Tensor, dq_SHD: Tensor, dk_TD: Tensor, dw_SH: Tensor
) -> None:
    """Adds the gradients of q, k, w for d(score) of one block; recomputes the products tile by tile."""
    a, b, lo, hi = block
    for first in range(lo, hi, KEY_TILE):
        last = min(first + KEY_TILE, hi)
        n = last - first
        dots = head_products(x, a, b, first, last)[:, :, :n].relu_()
        g_bn = dscore_bn[:, first - lo : last - lo]
        if x.k_scale_T is not None:
            g_bn = g_bn * x.k_scale_T[first:last]
        dw_SH[a:b] += torch.bmm(dots, g_bn.unsqueeze(-1)).squeeze(-1)
        # From here on `dots`, the largest temporary, holds d(q.k): g * w if the product was positive, else 0.
        d_bHn = dots.sign_().mul_(g_bn.unsqueeze(1)).mul_(x.w_SH[a:b].unsqueeze(-1))
        dq_SHD[a:b] += torch.matmul(d_bHn, x.k_TD[first:last])
        dk_TD[first:last] += d_bHn.flatten(0, 1).t() @ x.q_SHD[a:b].flatten(0, 1)


def index_gradients(x: IndexInputs) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(x.q_SHD), torch.zeros_like(x.k_TD), torch.zeros_like(x.w_SH)


def index_scores_backward(
    dscores_ST: Tensor,
    q_SHD: Tensor,
    k_TD: Tensor,
    w_SH: Tensor,
    starts_S: Tensor,
    ends_S: Tensor,
    k_scale_T: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x = pad_index_inputs(q_SHD, k_TD, w_SH, k_scale_T, ends_S)
    H, T = q_SHD.shape[1], k_TD.shape[0]
    dq, dk, dw = index_gradients(x)
    for block in query_blocks(starts_S, ends_S, score_elements(H)):
        d_bn = dscores_ST[block.a : block.b, block.lo : block.hi].to(dq.dtype)
        outside = out_of_range(block, starts_S, ends_S)
        if outside is not None:
            d_bn = d_bn.masked_fill(outside, 0.0)
        accumulate_index_gradient(x, block, d_bn, dq, dk, dw)
    return dq[:, :H].to(q_SHD.dtype).contiguous(), dk[:T].to(k_TD.dtype), dw[:, :H].to(w_SH.dtype).contiguous()


def largest(strip_bn: Tensor, k: int) -> Tensor:
    """The k largest values (b, k) of each row, in no order; a NaN is larger than every number.

    numpy's partition has one thread, and takes three times as long where many scores are 0, as a ReLU leaves them.
    """
    return torch.topk(strip_bn, k, dim=1, sorted=False).values


def select_strip(strip_bn: Tensor, block: Block, k: int, starts_S: Tensor, ends_S: Tensor) -> Tensor:
    """indices (b, min(k, hi-lo)) int32 of one block, ascending, then -1."""
    a, b, lo, hi = block
    if b - a == 1 and strip_bn.is_cpu:
        return select_alone(strip_bn, a, k).add_(lo)
    outside = out_of_range(block, starts_S, ends_S)
    if outside is not None:
        strip_bn = strip_bn.masked_fill(outside, float("-inf"))
    n = hi - lo
    if n <= k:
        reject_nan(strip_bn, a)
        chosen = torch.arange(n, device=strip_bn.device).expand(b - a, n)
    else:
        last_b1 = largest(strip_bn, k).amin(dim=1, keepdim=True)  # NaN in a row that has one
        if bool(last_b1.isnan().any()):
            reject_nan(strip_bn, a)
        chosen = (strip_bn >= last_b1).nonzero()[:, 1]
        if chosen.shape[0] > (b - a) * k:
            chosen = first_of_ties(strip_bn, last_b1, k).nonzero()[:, 1]
        chosen = chosen.view(b - a, k)
    if outside is None:
        return chosen.to(torch.int32).add_(lo)
    # Keys outside are the last ones: a block's queries share their first key.
    return torch.where(outside.gather(1, chosen), -1, chosen + lo).to(torch.int32)


def select_alone(strip_1n: Tensor, query: int, k: int) -> Tensor:
    """`select_strip` of one query on the CPU, in numpy: calls are what it costs, and numpy's cost a third."""
    strip_n = strip_1n[0].numpy()
    n = strip_n.shape[0]
    last = strip_n.min() if n <= k else np.partition(strip_n, -k)[-k:].min()  # NaN if the row has one
    if np.isnan(last):
        reject_nan(strip_1n, query)
    chosen = np.flatnonzero(strip_n >= last) if n > k else np.arange(n)
    if len(chosen) > k:
        ties = np.flatnonzero(strip_n == last)
        larger = np.flatnonzero(strip_n > last)
        chosen = np.sort(np.concatenate((larger, ties[: k - len(larger)])))
    return torch.from_numpy(chosen.astype(np.int32))[None]


def first_of_ties(strip_bn: Tensor, last_b1: Tensor, k: int) -> Tensor:
    """Mask (b, n) of the k largest, given the k-th, `last`: of those that equal it the first ones, up to k in all."""
    larger, equal = strip_bn > last_b1, strip_bn == last_b1
    return larger | (equal & (equal.cumsum(1, dtype=torch.int32) <= k - larger.sum(1, keepdim=True)))


def reject_nan(strip_bn: Tensor, first_query: int) -> None:
    broken = strip_bn.isnan().any(dim=1)
    if bool(broken.any()):
        raise ValueError(
            f"index scores of query {first_query + int(broken.nonzero()[0])} contain NaN: nothing can be selected; "
            "check the indexer's inputs and weights"
        )


def select_topk(scores_ST: Tensor, k: int, starts_S: Tensor, ends_S: Tensor) -> Tensor:
    indices_SK = torch.full((scores_ST.shape[0], k), -1, dtype=torch.int32, device=scores_ST.device)
    for block in query_blocks(starts_S, ends_S, lambda n: n):
        strip = scores_ST[block.a : block.b, block.lo : block.hi].to(compute_dtype(scores_ST))
        chosen = select_strip(strip, block, k, starts_S, ends_S)
        indices_SK[block.a : block.b, : chosen.shape[1]] = chosen
    return indices_SK


def index_topk(
    q_SHD: Tensor, k_TD: Tensor, w_SH: Tensor, k: int, starts_S: Tensor, ends_S: Tensor, k_scale_T: Tensor | None
) -> Tensor:
    x = pad_index_inputs(q_SHD, k_TD, w_SH, k_scale_T, ends_S)
    indices_SK = torch.full((q_SHD.shape[0], k), -1, dtype=torch.int32, device=q_SHD.device)
    for block in query_blocks(starts_S, ends_S, score_elements(q_SHD.shape[1])):
        chosen = select_strip(score_strip(x, block), block, k, starts_S, ends_S)
        if chosen.shape == indices_SK.shape:  # in decode one block is everything
            return chosen
        indices_SK[block.a : block.b, : chosen.shape[1]] = chosen
    return indices_SK
