"""The indexer's half of equation (4) in Triton: the KL between a target over the selected keys and softmax(I) there,
and its gradients.

Legend: S queries, T key tokens, K selected; H index heads (HP padded), D index width (DP padded). A program holds one
query.

The target is given as the attention's probabilities summed over heads (S, K); the attention's kernel sums them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.triton.attention import load_index, used_places
from tokensieve.ops.triton.in_order import add_in_order, strips, wanted_in_order
from tokensieve.ops.triton.index import exact, load_rows, padded, relu


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
    """One row: kl = KL(p || softmax(score)). If WEIGHTED, weight * d kl / d score instead, in the scores' place."""
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
    EXACT: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    """The gradients of q_I and w of one query, and its contribution to those of the keys that it selected."""
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
        row = index.to(tl.int64)
        if IN_ORDER:  # every place has its own row
            row = t * K + first + n
        tl.atomic_add(dk + row[:, None] * D + d[None, :], dk_ND, mask=live[:, None] & (d < D)[None, :], sem="relaxed")
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


def selected_kl(mass: Tensor, heads: int, q_I: Tensor, k_I: Tensor, w: Tensor, indices: Tensor) -> Tensor:
    """kl_S of a target `mass` / `heads`; zeros for rows without keys. Everything contiguous, S > 0."""
    S, K = indices.shape
    kl = torch.empty(S, dtype=torch.float32, device=q_I.device)
    scores = _selected_scores(q_I, k_I, w, indices)
    _kl_kernel[(S,)](mass, scores, indices, kl, kl, heads, k_I.shape[0], K, KP=padded(K), WEIGHTED=False)
    return kl


def selected_kl_backward(
    dkl: Tensor, mass: Tensor, heads: int, q_I: Tensor, k_I: Tensor, w: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq_I, dk_I (float32) and dw. Everything contiguous, S > 0."""
    (S, H, D), T, K = q_I.shape, k_I.shape[0], indices.shape[1]
    dq_I, dw = q_I.new_empty(q_I.shape), w.new_empty(w.shape)
    dk_I = torch.zeros(k_I.shape, dtype=torch.float32, device=k_I.device)
    scores = _selected_scores(q_I, k_I, w, indices)
    KP, HP, DP = padded(K), padded(H), padded(D)
    _kl_kernel[(S,)](mass, scores, indices, dkl, scores, heads, T, K, KP=KP, WEIGHTED=True)
    in_order = wanted_in_order()
    for part in strips(S, K * D * 4) if in_order else (slice(0, S),):
        s = part.stop - part.start
        sums = torch.zeros(s * K, D, dtype=torch.float32, device=k_I.device) if in_order else dk_I
        _index_gradient_kernel[(s,)](
            q_I[part], k_I, w[part], indices[part], scores[part], dq_I[part], sums, dw[part], T, K,
            H=H, D=D, HP=HP, DP=DP, BN=64, KP=KP, EXACT=exact(q_I), IN_ORDER=in_order, num_warps=4,
        )  # fmt: skip
        if in_order:
            add_in_order(dk_I, indices[part], sums)
    return dq_I, dk_I, dw
