"""The warm-up's KL over all visible keys, equation (3): value, gradient, and both in one pass.

Legend: S query tokens, T key tokens, H heads, G key-value groups, D key width; b queries in a block, n keys in its range.

A strip of queries x keys of the target and of the scores is all that exists at a time: memory is linear in T.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tokensieve.ops.reference.blocks import Block, compute_dtype, normalized, out_of_range, query_blocks, row_blocks
from tokensieve.ops.reference.dense import block_logits
from tokensieve.ops.reference.index import (
    accumulate_index_gradient,
    index_gradients,
    pad_index_inputs,
    score_elements,
    score_strip,
)


def target_strip(
    q_SHD: Tensor, k_TGD: Tensor, lse_SH: Tensor, scale: float, block: Block, outside: Tensor | None
) -> Tensor:
    """p (b, n): the mean over heads of the attention's probabilities, from its logsumexp; heads in slices of bounded size."""
    a, b, lo, hi = block
    G, H, n = k_TGD.shape[1], q_SHD.shape[1], hi - lo
    lse = lse_SH[a:b].to(compute_dtype(q_SHD)).t()
    p = torch.zeros(b - a, n, dtype=lse.dtype, device=lse.device)
    per_group = H // G
    for first, last in row_blocks(G, per_group * (b - a) * n, q_SHD):
        heads = slice(first * per_group, last * per_group)
        logits = block_logits(q_SHD[:, heads], k_TGD[:, first:last], block, scale)
        p += normalized(logits, lse[heads]).sum(0)
    p /= H
    return p if outside is None else p.masked_fill_(outside, 0.0)


def kl_blocks(q_SHD: Tensor, q_I: Tensor, starts_S: Tensor, ends_S: Tensor) -> Iterator[Block]:
    # One head's logits at least are held for all queries of a block, so a block is as wide as the scores or eight heads allow.
    elements = score_elements(q_I.shape[1])
    return query_blocks(starts_S, ends_S, lambda n: max(elements(n), min(q_SHD.shape[1], 8) * n))


def kl_strip(p_bn: Tensor, score_bn: Tensor, outside: Tensor | None) -> tuple[Tensor, Tensor]:
    """KL(p || softmax(score)) (b), and its gradient by the scores, softmax(score) * sum(p) - p (b, n)."""
    mass = p_bn.sum(1)
    cross = (p_bn * score_bn).sum(1)  # p is 0 outside the range, where scores are finite but mean nothing
    if outside is not None:
        score_bn = score_bn.masked_fill(outside, float("-inf"))
    lse = torch.logsumexp(score_bn, dim=1)
    kl = torch.xlogy(p_bn, p_bn).sum(1) - cross + lse * mass
    return kl, torch.exp(score_bn - lse[:, None]).mul_(mass[:, None]).sub_(p_bn)


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
    x = pad_index_inputs(q_I, k_I, w, None, ends_S)
    kl_S = torch.zeros(q_SHD.shape[0], dtype=x.q_SHD.dtype, device=q_SHD.device)
    for block in kl_blocks(q_SHD, q_I, starts_S, ends_S):
        outside = out_of_range(block, starts_S, ends_S)
        p = target_strip(q_SHD, k_TGD, lse_SH, scale, block, outside)
        kl_S[block.a : block.b] = kl_strip(p, score_strip(x, block), outside)[0]
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
    """kl (S) and the gradients of sum(weight * kl) by q_I, k_I and w: target and scores are computed once for all four."""
    x = pad_index_inputs(q_I, k_I, w, None, ends_S)
    kl_S = torch.zeros(q_SHD.shape[0], dtype=x.q_SHD.dtype, device=q_SHD.device)
    dq, dk, dw = index_gradients(x)
    for block in kl_blocks(q_SHD, q_I, starts_S, ends_S):
        outside = out_of_range(block, starts_S, ends_S)
        p = target_strip(q_SHD, k_TGD, lse_SH, scale, block, outside)
        kl, dscore = kl_strip(p, score_strip(x, block), outside)
        kl_S[block.a : block.b] = kl
        accumulate_index_gradient(x, block, dscore.mul_(weight_S[block.a : block.b, None].to(p.dtype)), dq, dk, dw)
    H, T = q_I.shape[1], k_I.shape[0]
    return kl_S, dq[:, :H].to(q_I.dtype).contiguous(), dk[:T].to(k_I.dtype), dw[:, :H].to(w.dtype).contiguous()


def indexer_kl_dense_backward(
    dkl_S: Tensor, q_SHD: Tensor, k_TGD: Tensor, lse_SH: Tensor, scale: float,
    q_I: Tensor, k_I: Tensor, w: Tensor, starts_S: Tensor, ends_S: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return indexer_kl_dense_step(q_SHD, k_TGD, lse_SH, scale, q_I, k_I, w, starts_S, ends_S, dkl_S)[1:]
