"""Selection in two levels in Triton: equation (2) among the keys of the best blocks.

Legend: S query tokens, T key tokens, H index heads (HP padded to a power of two), D index width (DP padded), P whole
blocks of keys, B blocks that a query may look into, K selected. Places are those of `reference.two_level`: a query's
candidates have their keys at [0, B * block).

Blocks are scored and selected as keys are, by the kernels of `index` and `topk`, with the blocks' mean keys as keys.
Then a program scores the candidates' keys for one query: product, sum and scale are those of `index`, in the same
order, so that a score has the same bits. Of these scores `topk` selects places, which become positions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.reference.two_level import Candidates, candidates, inner_blocks
from tokensieve.ops.triton import topk
from tokensieve.ops.triton.index import BK, chunks, exact, index_scores, load_rows, padded, ranges, relu
from tokensieve.ops.triton.paged_write import quantized

ROWS: tl.constexpr = tl.constexpr(16)  # keys of a block that are added at a time
NAMES = 1024  # selected places of a program


@triton.jit
def _means_kernel(
    k, k_scale, means, mean_scales,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    p, n, d = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS), tl.arange(0, DP)
    sums_ND = tl.zeros((ROWS, DP), dtype=tl.float32)
    for i in range(0, BLOCK, ROWS):
        row = p * BLOCK + i + n
        k_ND = load_rows(k, row, row >= 0, d, D).to(tl.float32)
        if SCALED:
            k_ND *= tl.load(k_scale + row).to(tl.float32)[:, None]
        sums_ND += k_ND
    mean_1D = tl.sum(sums_ND, 0)[None, :] * (1 / BLOCK)
    if QUANTIZED:
        mean_1D, scale_1 = quantized(mean_1D)
        tl.store(mean_scales + p + tl.arange(0, 1), scale_1)
    tl.store(means + p * D + d[None, :], mean_1D.to(means.dtype.element_ty), mask=(d < D)[None, :])


def block_means(k_TD: Tensor, k_scale_T: Tensor | None, block: int) -> tuple[Tensor, Tensor | None]:
    """The mean key of every whole block (P, D) in k's dtype, and the means' scales (P) if that is E4M3."""
    P, D, fp8 = k_TD.shape[0] // block, k_TD.shape[1], k_TD.dtype == torch.float8_e4m3fn
    means_PD = torch.empty(P, D, dtype=torch.uint8 if fp8 else k_TD.dtype, device=k_TD.device)
    scale_P = torch.empty(P, dtype=torch.float32, device=k_TD.device) if fp8 else None
    if P > 0:
        _means_kernel[(P,)](
            k_TD.contiguous(), None if k_scale_T is None else k_scale_T.contiguous(), means_PD, scale_P,
            D=D, DP=padded(D), BLOCK=block, SCALED=k_scale_T is not None, QUANTIZED=fp8, num_warps=4,
        )  # fmt: skip
    return means_PD.view(k_TD.dtype), scale_P


@triton.jit
def _candidate_scores_kernel(
    q, k, w, k_scale, blocks, firsts, lasts, out, T, B, chunk,
    H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
    SCALED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    t, d, n, head = tl.program_id(0), tl.arange(0, DP), tl.arange(0, BK), tl.arange(0, HP)
    lo = tl.maximum(tl.load(firsts + t) // BK * BK, tl.program_id(1) * chunk)
    hi = tl.minimum(tl.load(lasts + t), tl.program_id(1) * chunk + chunk)
    q_RD = load_rows(q, t * H + head, head < H, d, D)
    w_R = tl.load(w + t * H + head, mask=head < H, other=0.0).to(tl.float32)
    blocks += t.to(tl.int64) * B
    out += t.to(tl.int64) * B * BLOCK
    named_N = tl.load(blocks + (lo + n) // BLOCK, mask=lo + n < hi, other=0)
    for s in range(lo, hi, BK):
        place_N = s + n
        after = place_N + BK
        after_N = tl.load(blocks + after // BLOCK, mask=after < hi, other=0)  # early, so that its keys need not wait
        key_N = named_N * BLOCK + place_N % BLOCK
        there_N = (place_N < hi) & (key_N < T)
        k_ND = load_rows(k, key_N, there_N, d, D)
        dots_NR = tl.dot(k_ND, tl.trans(q_RD), input_precision=EXACT)
        score_NQ = tl.sum(tl.reshape(relu(dots_NR) * w_R[None, :], (BK, 1, HP)), 2)
        if SCALED:
            score_NQ *= tl.load(k_scale + key_N, mask=there_N, other=0.0)[:, None]
        tl.store(out + place_N[:, None], score_NQ, mask=there_N[:, None])
        named_N = after_N


def candidate_scores(
    q_SHD: Tensor, k_TD: Tensor, w_SH: Tensor, k_scale_T: Tensor | None, found: Candidates, block: int
) -> Tensor:
    """Index scores (S, B * block) float32 of the candidates' keys, by place; unspecified outside of [first, last)."""
    (S, H, D), T, B = q_SHD.shape, k_TD.shape[0], found.blocks_SB.shape[1]
    scores_SC = torch.empty(S, B * block, dtype=torch.float32, device=q_SHD.device)
    grid, chunk = chunks(S, B * block, 1, BK, least=16)
    _candidate_scores_kernel[grid](
        q_SHD.contiguous(), k_TD.contiguous(), w_SH.contiguous(), k_scale_T, *found, scores_SC, T, B, chunk,
        H=H, D=D, HP=padded(H), DP=padded(D, 32), BK=BK, BLOCK=block,
        SCALED=k_scale_T is not None, EXACT=exact(q_SHD), num_warps=4, num_stages=4,
    )  # fmt: skip
    return scores_SC


@triton.jit
def _positions_kernel(places, blocks, K, B, BLOCK: tl.constexpr, NAMES: tl.constexpr):
    t, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * NAMES + tl.arange(0, NAMES)
    place = tl.load(places + t * K + j, mask=j < K, other=-1)
    named = tl.load(blocks + t * B + place // BLOCK, mask=place >= 0, other=0)
    tl.store(places + t * K + j, named * BLOCK + place % BLOCK, mask=place >= 0)


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
    S, T, device = q_SHD.shape[0], k_TD.shape[0], q_SHD.device
    starts_S, ends_S = ranges(starts_S.clamp(0, T), ends_S.clamp(0, T))
    firsts_S, lasts_S = inner_blocks(starts_S, ends_S, block)
    means_PD, scale_P = block_means(k_TD, k_scale_T, block)
    P, C = means_PD.shape[0], blocks * block
    indices_SK = topk.new_indices(S, k, C, device)
    rows, broken = max(1, topk.SCORES // max(P, C)), torch.zeros(1, dtype=torch.int32, device=device)
    for a in range(0, S, rows):
        part = slice(a, min(a + rows, S))
        q, w, inner = q_SHD[part], w_SH[part], (firsts_S[part], lasts_S[part])
        best = topk.new_indices(len(q), blocks - 2, P, device)
        if blocks > 2:
            scores = index_scores(q, means_PD, w, *inner, scale_P)
            broken = torch.maximum(broken, topk.select_into(scores, blocks - 2, *inner, best, S - a))
        found = candidates(best, starts_S[part], ends_S[part], block)
        scores = candidate_scores(q, k_TD, w, k_scale_T, found, block)
        selected = indices_SK[part]
        broken_part = topk.select_into(scores, k, found.firsts_S, found.lasts_S, selected, S - a)
        broken = torch.maximum(broken, broken_part)
        _positions_kernel[(len(q), triton.cdiv(k, NAMES))](
            selected, found.blocks_SB, k, blocks, BLOCK=block, NAMES=NAMES, num_warps=4
        )
        del scores  # before the next strip is made
    topk.reject_nan(broken, S)
    return indices_SK
