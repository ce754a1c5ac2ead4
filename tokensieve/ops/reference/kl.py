"""The warm-up's KL over all visible keys, equation (3): value, gradient, and both in one pass.

Legend: S query tokens, T key tokens, H heads (of the indexer if D is its width), G key-value groups, D width; b queries
in a block, n keys in its range.

Only a strip of queries x keys of the target and of the scores exists at a time: memory is linear in T. Selection needs
scores with the same bits whatever the blocking (`index.py`); a loss does not, so scores are plain products of all the
block's queries and heads.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tokensieve.ops.reference.blocks import Block, compute_dtype, out_of_range, query_blocks, row_blocks
from tokensieve.ops.reference.dense import block_logits


def target_strip(
    q_SHD: Tensor, k_TGD: Tensor, lse_SH: Tensor, scale: float, block: Block, outside: Tensor | None
) -> Tensor:
    """p (b, n): the mean over heads of the attention's probabilities, from its logsumexp.

    Heads are taken in slices of bounded size.
    """
    a, b, lo, hi = block
    G, H, n = k_TGD.shape[1], q_SHD.shape[1], hi - lo
    lse = lse_SH[a:b].to(compute_dtype(q_SHD)).t()
    lse = lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)
    p = torch.zeros(b - a, n, dtype=lse.dtype, device=lse.device)
    per_group = H // G
    for first, last in row_blocks(G, per_group * (b - a) * n, q_SHD):
        heads = slice(first * per_group, last * per_group)
        logits = block_logits(q_SHD[:, heads], k_TGD[:, first:last], block, scale)
        p += logits.sub_(lse[heads]).exp_().sum(0)
    p /= H
    return p if outside is None else p.masked_fill_(outside, 0.0)


def score_strip(q_bHD: Tensor, k_nD: Tensor, w_bH: Tensor) -> tuple[Tensor, Tensor]:
    """Index scores (b, n) and the relu'd products (b, H, n) that they sum."""
    b, H, _ = q_bHD.shape
    dots = torch.mm(q_bHD.flatten(0, 1), k_nD.t()).relu_().view(b, H, -1)
    return torch.bmm(w_bH.unsqueeze(1), dots).squeeze(1), dots


def open_gradient(dots_bHn: Tensor, dscore_bn: Tensor) -> Tensor:
    """d(score) if the relu let a product through, else 0 (b, H, n).

    It takes the place of the products, which are the largest temporary.
    """
    dscore_bHn = dscore_bn.unsqueeze(1).expand_as(dots_bHn)
    return torch.ops.aten.threshold_backward.grad_input(dscore_bHn, dots_bHn, 0, grad_input=dots_bHn)


def weighted_gradients(moved_bHD: Tensor, q_bHD: Tensor, w_bH: Tensor) -> tuple[Tensor, Tensor]:
    """dq (b, H, D) and dw (b, H) from the product of `open_gradient` with the keys.

    relu(q . k) is q . k or 0, so dw is that product times q.
    """
    return moved_bHD * w_bH.unsqueeze(-1), (moved_bHD * q_bHD).sum(-1)


def kl_blocks(q_SHD: Tensor, q_I: Tensor, starts_S: Tensor, ends_S: Tensor) -> Iterator[Block]:
    # A block holds the products of all index heads, and one slice of the attention's, eight heads at least.
    heads = max(q_I.shape[1], min(q_SHD.shape[1], 8))
    return query_blocks(starts_S, ends_S, lambda n: heads * n)


def kl_strip(p_bn: Tensor, score_bn: Tensor, outside: Tensor | None) -> tuple[Tensor, Tensor]:
    """KL(p || softmax(score)) (b), and its gradient by the scores, softmax(score) * sum(p) - p (b, n).

    The gradient takes the scores' place.
    """
    mass = p_bn.sum(1)
    # p log p by a clamped logarithm: several times faster than xlogy, and also 0 if p is 0.
    entropy = p_bn.clamp_min(torch.finfo(p_bn.dtype).tiny).log_().mul_(p_bn).sum(1)
    cross = (p_bn * score_bn).sum(1)  # p is 0 outside the range, where scores are finite but mean nothing
    if outside is not None:
        score_bn.masked_fill_(outside, float("-inf"))
    lse = torch.logsumexp(score_bn, dim=1)
    kl = entropy - cross + lse * mass
    return kl, score_bn.sub_(lse[:, None]).exp_().mul_(mass[:, None]).sub_(p_bn)


def indexer_kl_dense(
    q_SHD: Tensor,
    k_TGD: Tensor,
    lse_SH: Tensor,
    scale: float,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
    starts_S: Tensor,
    ends_S: Tensor,
) -> Tensor:
    dtype = compute_dtype(q_I)
    q, k, w = q_I.to(dtype), k_I.to(dtype), w.to(dtype)
    kl_S = torch.zeros(q_SHD.shape[0], dtype=dtype, device=q_SHD.device)
    for block in kl_blocks(q_SHD, q_I, starts_S, ends_S):
        a, b, lo, hi = block
        outside = out_of_range(block, starts_S, ends_S)
        p = target_strip(q_SHD, k_TGD, lse_SH, scale, block, outside)
        kl_S[a:b] = kl_strip(p, score_strip(q[a:b], k[lo:hi], w[a:b])[0], outside)[0]
    return kl_S


def indexer_kl_dense_step(
    q_SHD: Tensor,
    k_TGD: Tensor,
    lse_SH: Tensor,
    scale: float,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
    starts_S: Tensor,
    ends_S: Tensor,
    weight_S: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kl (S) and the gradients of sum(weight * kl) by q_I, k_I and w.

    Target and scores are computed once for all four.
    """
    dtype = compute_dtype(q_I)
    q, k, w32 = (x.to(dtype).contiguous() for x in (q_I, k_I, w))
    kl_S = torch.zeros(q_SHD.shape[0], dtype=dtype, device=q_SHD.device)
    dq, dk, dw = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(w32)
    for block in kl_blocks(q_SHD, q_I, starts_S, ends_S):
        a, b, lo, hi = block
        outside = out_of_range(block, starts_S, ends_S)
        p = target_strip(q_SHD, k_TGD, lse_SH, scale, block, outside)
        score, dots = score_strip(q[a:b], k[lo:hi], w32[a:b])
        kl_S[a:b], dscore = kl_strip(p, score, outside)
        dscore.mul_(weight_S[a:b, None].to(dtype))
        opened = open_gradient(dots, dscore).flatten(0, 1)
        moved = torch.mm(opened, k[lo:hi]).view_as(q[a:b])
        dq[a:b], dw[a:b] = weighted_gradients(moved, q[a:b], w32[a:b])
        dk[lo:hi].addmm_(opened.t(), (q[a:b] * w32[a:b].unsqueeze(-1)).flatten(0, 1))
    return kl_S, dq.to(q_I.dtype), dk.to(k_I.dtype), dw.to(w.dtype)


def indexer_kl_dense_backward(
    dkl_S: Tensor, q_SHD: Tensor, k_TGD: Tensor, lse_SH: Tensor, scale: float,
    q_I: Tensor, k_I: Tensor, w: Tensor, starts_S: Tensor, ends_S: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return indexer_kl_dense_step(q_SHD, k_TGD, lse_SH, scale, q_I, k_I, w, starts_S, ends_S, dkl_S)[1:]
