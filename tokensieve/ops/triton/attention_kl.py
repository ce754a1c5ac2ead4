"""The indexer's loss of sparse training, equation (4), in Triton: attention over selected entries, and its KL.

Legend: S queries, T key tokens, H heads, G key-value groups, K selected; HI index heads (HP padded), D index width (DP padded). A program
holds one query.

Forward needs the head-summed probabilities once more after the logsumexp is known; in backward they fall out of dq. Only rows of K
are ever stored: scores (S, K), and probabilities, in backward one (S, K) per block of heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.triton.attention import (
    LOG2E,
    backward_with_mass,
    head_block,
    load_entry,
    load_index,
    load_part,
    sparse_attention,
    used_places,
    widths,
)
from tokensieve.ops.triton.index import exact, load_rows, padded, relu


@triton.jit(do_not_specialize=["T"])
def _mass_kernel(
    q, kv, indices, lse, mass, T, K, scale,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, d_k: tl.constexpr, v_start: tl.constexpr, d_v: tl.constexpr,
    DM: tl.constexpr, DT: tl.constexpr, VP: tl.constexpr, SHARED: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The attention's probabilities summed over all heads, for one tile of a query's entries."""
    M: tl.constexpr = H // G
    tiles, n = (K + BN - 1) // BN, tl.arange(0, BN)
    t, first = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BN
    index = load_index(indices + t * K, first + n, K, T)
    mass_N = tl.zeros((BN,), tl.float32)
    if tl.max(index) >= 0:
        for g in range(G):
            # the value is not read: a value that is the main part is that part once more
            main, tail, _ = load_entry(kv, index, g, G, E, d_k, v_start, d_v, DM, DT, VP, True)
            for begin in range(0, M, BH):
                head = begin + tl.arange(0, BH)
                mine = head < M
                row = t * H + g * M + head
                q_main = load_part(q, row * d_k, mine, d_k if d_k < DM else DM, DM)
                logit_HN = tl.dot(q_main, tl.trans(main), input_precision=EXACT)
                if DT > 0:
                    q_tail = load_part(q, row * d_k + DM, mine, d_k - DM, DT)
                    logit_HN = tl.dot(q_tail, tl.trans(tail), logit_HN, input_precision=EXACT)
                lse_H = tl.load(lse + row, mask=mine, other=float("inf"))
                lse_H = tl.where(lse_H == float("-inf"), float("inf"), lse_H) * LOG2E
                mass_N += tl.sum(tl.exp2(logit_HN * (scale * LOG2E) - lse_H[:, None]), 0)
    tl.store(mass + t * K + first + n, tl.where(index >= 0, mass_N, 0.0), mask=first + n < K)


@triton.jit(do_not_specialize=["T"])
def _selected_scores_kernel(
    q, k, w, indices, scores, T, K,
    H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Equation (1) for a query's selected keys."""
    t, n = tl.program_id(0).to(tl.int64), tl.arange(0, BN)
    head, d = tl.arange(0, HP), tl.arange(0, DP)
    q_HD = load_rows(q, t * H + head, head < H, d, D)
    w_H = tl.load(w + t * H + head, mask=head < H, other=0.0).to(tl.float32)
    for first in range(0, used_places(indices + t * K, K, KP), BN):
        index = load_index(indices + t * K, first + n, K, T)
        k_ND = load_rows(k, index, index >= 0, d, D)
        dots_HN = tl.dot(q_HD, tl.trans(k_ND), input_precision=EXACT)
        tl.store(
            scores + t * K + first + n,
            tl.sum(relu(dots_HN) * w_H[:, None], 0),
            mask=first + n < K,
        )


@triton.jit(do_not_specialize=["T"])
def _kl_kernel(
    mass, scores, indices, weight, kl, H, T, K, KP: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    """One row: kl = KL(p || softmax(score)); WEIGHTED: weight * d kl / d score instead, in the scores' place."""
    t, n = tl.program_id(0).to(tl.int64), tl.arange(0, KP)
    live = load_index(indices + t * K, n, K, T) >= 0
    p = tl.load(mass + t * K + n, mask=live, other=0.0) / H
    score = tl.load(scores + t * K + n, mask=live, other=float("-inf"))
    largest = tl.max(score)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    share = tl.exp(score - largest)
    total = tl.sum(share)
    lse = largest + tl.log(tl.where(total > 0, total, 1.0))
    if WEIGHTED:
        d = share / tl.where(total > 0, total, 1.0) * tl.sum(p) - p
        tl.store(scores + t * K + n, d * tl.load(weight + t).to(tl.float32), mask=live)
    else:
        log_p = tl.log(tl.where(p > 0, p, 1.0))
        tl.store(kl + t, tl.sum(p * tl.where(live, log_p - score + lse, 0.0)))


@triton.jit(do_not_specialize=["T"])
def _index_gradient_kernel(
    q, k, w, indices, dscores, dq, dk, dw, T, K,
    H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """The gradients of q_I and w of one query, and its part of those of the keys that it selected."""
    t, n = tl.program_id(0).to(tl.int64), tl.arange(0, BN)
    head, d = tl.arange(0, HP), tl.arange(0, DP)
    q_HD = load_rows(q, t * H + head, head < H, d, D)
    w_H = tl.load(w + t * H + head, mask=head < H, other=0.0).to(tl.float32)
    weighted_HD = (q_HD.to(tl.float32) * w_H[:, None]).to(q_HD.dtype)
    moved_HD = tl.zeros((HP, DP), tl.float32)
    for first in range(0, used_places(indices + t * K, K, KP), BN):
        index = load_index(indices + t * K, first + n, K, T)
        live = index >= 0
        k_ND = load_rows(k, index, live, d, D)
        g_N = tl.load(dscores + t * K + first + n, mask=live, other=0.0)
        dots_HN = tl.dot(q_HD, tl.trans(k_ND), input_precision=EXACT)
        opened_HN = tl.where(dots_HN > 0, g_N[None, :], 0.0).to(k_ND.dtype)
        moved_HD = tl.dot(opened_HN, k_ND, moved_HD, input_precision=EXACT)
        dk_ND = tl.dot(tl.trans(opened_HN), weighted_HD, input_precision=EXACT)
        place = dk + index.to(tl.int64)[:, None] * D + d[None, :]
        tl.atomic_add(place, dk_ND, mask=live[:, None] & (d < D)[None, :], sem="relaxed")
    place = dq + (t * H + head)[:, None] * D + d[None, :]
    tl.store(place, moved_HD * w_H[:, None], mask=(head < H)[:, None] & (d < D)[None, :])
    tl.store(dw + t * H + head, tl.sum(moved_HD * q_HD.to(tl.float32), 1), mask=head < H)


def _selected_scores(q_I: Tensor, k_I: Tensor, w: Tensor, indices: Tensor) -> Tensor:
    (S, H, D), T, K = q_I.shape, k_I.shape[0], indices.shape[1]
    scores = torch.empty(S, K, dtype=torch.float32, device=q_I.device)
    _selected_scores_kernel[(S,)](
        q_I, k_I, w, indices, scores, T, K, H=H, D=D, HP=padded(H), DP=padded(D), BN=64, KP=padded(K), EXACT=exact(q_I)
    )
    return scores


def sparse_attention_kl(
    q_SHD: Tensor,
    kv_TGE: Tensor,
    indices_SK: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    (S, H, _), (T, G, E), K = q_SHD.shape, kv_TGE.shape, indices_SK.shape[1]
    out, lse = sparse_attention(q_SHD, kv_TGE, indices_SK, scale, d_k, v_start, d_v)
    kl = torch.zeros(S, dtype=torch.float32, device=q_SHD.device)
    if S == 0:
        return out, lse, kl
    q, kv, indices, q_I, k_I, w = (x.contiguous() for x in (q_SHD, kv_TGE, indices_SK, q_I, k_I, w))
    mass = torch.empty(S, K, dtype=torch.float32, device=q.device)
    _mass_kernel[(S * triton.cdiv(K, 64),)](
        q, kv, indices, lse, mass, T, K, scale, H=H, G=G, E=E, d_k=d_k, v_start=v_start, d_v=d_v, **widths(d_k, v_start, d_v),
        BH=min(32, head_block(H // G)), BN=64, EXACT=exact(q), num_warps=4, num_stages=2,
    )  # fmt: skip
    scores = _selected_scores(q_I, k_I, w, indices)
    _kl_kernel[(S,)](mass, scores, indices, kl, kl, H, T, K, KP=padded(K), WEIGHTED=False)
    return out, lse, kl


def sparse_attention_kl_backward(
    dout_SHV: Tensor,
    dlse_SH: Tensor | None,
    dkl_S: Tensor,
    q_SHD: Tensor,
    kv_TGE: Tensor,
    indices_SK: Tensor,
    out_SHV: Tensor,
    lse_SH: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dkv, mass = backward_with_mass(
        dout_SHV, dlse_SH, q_SHD, kv_TGE, indices_SK, out_SHV, lse_SH, scale, d_k, v_start, d_v, with_mass=True
    )
    (S, H, D), T, K = q_I.shape, k_I.shape[0], indices_SK.shape[1]
    dq_I, dw = q_I.new_empty(q_I.shape), w.new_empty(w.shape)
    dk_I = torch.zeros(k_I.shape, dtype=torch.float32, device=k_I.device)
    if S > 0:
        indices, q_c, k_c, w_c = (x.contiguous() for x in (indices_SK, q_I, k_I, w))
        scores = _selected_scores(q_c, k_c, w_c, indices)
        KP, HP, DP = padded(K), padded(H), padded(D)
        _kl_kernel[(S,)](mass, scores, indices, dkl_S.contiguous(), scores, q_SHD.shape[1], T, K, KP=KP, WEIGHTED=True)
        _index_gradient_kernel[(S,)](
            q_c, k_c, w_c, indices, scores, dq_I, dk_I, dw, T, K,
            H=H, D=D, HP=HP, DP=DP, BN=64, KP=KP, EXACT=exact(q_c), num_warps=4,
        )  # fmt: skip
    return dq, dkv, dq_I, dk_I.to(k_I.dtype), dw
