"""Dense attention, attention masked to a selection, and the KL of equation (3), forward and backward.

Legend: S query tokens, T key tokens, H heads, G key-value groups, D key width, V value width; b queries in a block, n keys in its range.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tokensieve.ops.reference.blocks import (
    Block,
    block_elements,
    compute_dtype,
    normalized,
    out_of_range,
    query_blocks,
    row_blocks,
)
from tokensieve.ops.reference.index import (
    accumulate_index_gradient,
    index_gradients,
    pad_index_inputs,
    score_elements,
    score_strip,
)

Excluded = Callable[[Block], Tensor | None]  # a block's mask (b, n), True where a key does not take part


def block_logits(q_SHD: Tensor, k_TGD: Tensor, block: Block, scale: float) -> Tensor:
    """scale * q . k (H, b, n); head h uses group h // (H/G)."""
    a, b, lo, hi = block
    G = k_TGD.shape[1]
    dtype = compute_dtype(q_SHD)
    q = q_SHD[a:b].to(dtype).transpose(0, 1).reshape(G, -1, q_SHD.shape[2])
    k = k_TGD[lo:hi].to(dtype).permute(1, 2, 0)
    return torch.bmm(q, k).mul_(scale).view(q_SHD.shape[1], b - a, hi - lo)


def grouped_rows(x_HbX: Tensor, G: int) -> Tensor:
    """(H, b, X) -> (G, H/G*b, X)."""
    return x_HbX.reshape(G, -1, x_HbX.shape[2])


def block_attention(
    q_SHD: Tensor, k_TGD: Tensor, v_TGV: Tensor, scale: float, blocks: Iterator[Block], excluded: Excluded
) -> tuple[Tensor, Tensor]:
    S, H, _ = q_SHD.shape
    G, V = v_TGV.shape[1:]
    dtype = compute_dtype(q_SHD)
    out_SHV = q_SHD.new_zeros(S, H, V)
    lse_SH = torch.full((S, H), float("-inf"), dtype=dtype, device=q_SHD.device)
    for block in blocks:
        a, b, lo, hi = block
        logits = block_logits(q_SHD, k_TGD, block, scale)
        mask = excluded(block)
        if mask is not None:
            logits.masked_fill_(mask, float("-inf"))
        lse = torch.logsumexp(logits, dim=-1)
        p = torch.softmax(logits, dim=-1)  # not exp(logits - lse): at logits of 1e4 lse has too few digits left
        values = v_TGV[lo:hi].to(dtype).transpose(0, 1)
        out_SHV[a:b] = torch.bmm(grouped_rows(p, G), values).view(H, b - a, V).transpose(0, 1)
        lse_SH[a:b] = lse.t()
    return out_SHV, lse_SH


def block_attention_backward(
    dout_SHV: Tensor,
    dlse_SH: Tensor | None,
    q_SHD: Tensor,
    k_TGD: Tensor,
    v_TGV: Tensor,
    out_SHV: Tensor,
    lse_SH: Tensor,
    scale: float,
    blocks: Iterator[Block],
    excluded: Excluded,
) -> tuple[Tensor, Tensor, Tensor]:
    H, D = q_SHD.shape[1:]
    G = v_TGV.shape[1]
    dtype = compute_dtype(q_SHD)
    dq_SHD = q_SHD.new_zeros(q_SHD.shape)
    dk_TGD = torch.zeros(k_TGD.shape, dtype=dtype, device=k_TGD.device)
    dv_TGV = torch.zeros(v_TGV.shape, dtype=dtype, device=v_TGV.device)
    for block in blocks:
        a, b, lo, hi = block
        logits = block_logits(q_SHD, k_TGD, block, scale)
        mask = excluded(block)
        if mask is not None:
            logits.masked_fill_(mask, float("-inf"))
        p = normalized(logits, lse_SH[a:b].to(dtype).t())
        dout = dout_SHV[a:b].to(dtype).transpose(0, 1)
        delta = (dout * out_SHV[a:b].to(dtype).transpose(0, 1)).sum(-1)
        if dlse_SH is not None:
            delta = delta - dlse_SH[a:b].to(dtype).t()
        dv_TGV[lo:hi] += torch.bmm(grouped_rows(p, G).transpose(1, 2), grouped_rows(dout, G)).transpose(0, 1)
        values = v_TGV[lo:hi].to(dtype).permute(1, 2, 0)
        dp = torch.bmm(grouped_rows(dout, G), values).view(H, b - a, hi - lo)
        ds = grouped_rows(dp.sub_(delta.unsqueeze(-1)).mul_(p).mul_(scale), G)
        keys = k_TGD[lo:hi].to(dtype).transpose(0, 1)
        dq_SHD[a:b] = torch.bmm(ds, keys).view(H, b - a, D).transpose(0, 1)
        q = q_SHD[a:b].to(dtype).transpose(0, 1).reshape(G, -1, D)
        dk_TGD[lo:hi] += torch.bmm(ds.transpose(1, 2), q).transpose(0, 1)
    return dq_SHD, dk_TGD.to(k_TGD.dtype), dv_TGV.to(v_TGV.dtype)


def dense_blocks(q_SHD: Tensor, starts_S: Tensor, ends_S: Tensor) -> tuple[Iterator[Block], Excluded]:
    H = q_SHD.shape[1]
    return query_blocks(starts_S, ends_S, lambda n: H * n), lambda block: out_of_range(block, starts_S, ends_S)


def dense_attention(
    q_SHD: Tensor,
    k_TGD: Tensor,
    v_TGV: Tensor,
    starts_S: Tensor,
    ends_S: Tensor,
    bounds: Tensor | None,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return block_attention(q_SHD, k_TGD, v_TGV, scale, *dense_blocks(q_SHD, starts_S, ends_S))


def dense_attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    starts_S: Tensor, ends_S: Tensor, bounds: Tensor | None, longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return block_attention_backward(dout, dlse, q, k, v, out, lse, scale, *dense_blocks(q, starts_S, ends_S))


def selection_blocks(q_SHD: Tensor, indices_SK: Tensor) -> tuple[Iterator[Block], Excluded]:
    """Blocks over the span of keys that the queries selected, and the mask of everything that they did not."""

    def blocks() -> Iterator[Block]:
        valid = indices_SK >= 0
        last = torch.where(valid, indices_SK, -1).amax(1).tolist()
        first = torch.where(valid, indices_SK, torch.iinfo(torch.int32).max).amin(1).tolist()
        S, H, a = q_SHD.shape[0], q_SHD.shape[1], 0
        while a < S:
            lo, hi, b = first[a], last[a] + 1, a + 1
            if hi <= 0:
                a += 1
                continue
            # A block grows while the keys it spans stay mostly shared; a query of another document begins a new one.
            while b < S and last[b] >= 0 and first[b] < hi:
                low, high = min(lo, first[b]), max(hi, last[b] + 1)
                if (b + 1 - a) * (high - low) * H > block_elements(q_SHD):
                    break
                lo, hi, b = low, high, b + 1
            yield Block(a, b, lo, hi)
            a = b

    def excluded(block: Block) -> Tensor:
        a, b, lo, hi = block
        chosen = indices_SK[a:b]
        # One column past the range collects the -1s.
        column = torch.where(chosen < 0, hi - lo, chosen - lo).long()
        mask = torch.ones(b - a, hi - lo + 1, dtype=torch.bool, device=q_SHD.device)
        return mask.scatter_(1, column, False)[:, : hi - lo]

    return blocks(), excluded


def masked_attention(
    q_SHD: Tensor, k_THD: Tensor, v_THV: Tensor, indices_SK: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return block_attention(q_SHD, k_THD, v_THV, scale, *selection_blocks(q_SHD, indices_SK))


def masked_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices_SK: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return block_attention_backward(dout, dlse, q, k, v, out, lse, scale, *selection_blocks(q, indices_SK))


# equation (3): the warm-up's KL over all visible keys


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


def head_mass(q_SHD: Tensor, k_TGD: Tensor, starts_S: Tensor, ends_S: Tensor, scale: float) -> Tensor:
    mass_ST = torch.zeros(q_SHD.shape[0], k_TGD.shape[0], dtype=compute_dtype(q_SHD), device=q_SHD.device)
    blocks, excluded = dense_blocks(q_SHD, starts_S, ends_S)
    for block in blocks:
        logits = block_logits(q_SHD, k_TGD, block, scale)
        mask = excluded(block)
        if mask is not None:
            logits.masked_fill_(mask, float("-inf"))
        mass_ST[block.a : block.b, block.lo : block.hi] = torch.softmax(logits, dim=-1).mean(0)
    return mass_ST


def kl_blocks(q_SHD: Tensor, q_I: Tensor, starts_S: Tensor, ends_S: Tensor) -> Iterator[Block]:
    # One head's logits at least are held for all queries of a block, so a block is as wide as the scores or eight heads allow.
    elements = score_elements(q_I.shape[1])
    return query_blocks(starts_S, ends_S, lambda n: max(elements(n), min(q_SHD.shape[1], 8) * n))


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
        score = score_strip(x, block)
        lse = torch.logsumexp(score if outside is None else score.masked_fill(outside, float("-inf")), dim=1)
        kl_S[block.a : block.b] = torch.xlogy(p, p).sum(1) - (p * score).sum(1) + lse * p.sum(1)
    return kl_S


def indexer_kl_dense_backward(
    dkl_S: Tensor, q_SHD: Tensor, k_TGD: Tensor, lse_SH: Tensor, scale: float,
    q_I: Tensor, k_I: Tensor, w: Tensor, starts_S: Tensor, ends_S: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dL/dI = softmax(I) - p, then through the scores; a strip of queries x keys of dI is all that exists at a time."""
    x = pad_index_inputs(q_I, k_I, w, None, ends_S)
    dq, dk, dw = index_gradients(x)
    for block in kl_blocks(q_SHD, q_I, starts_S, ends_S):
        outside = out_of_range(block, starts_S, ends_S)
        p = target_strip(q_SHD, k_TGD, lse_SH, scale, block, outside)
        score = score_strip(x, block)
        if outside is not None:
            score = score.masked_fill(outside, float("-inf"))
        dscore = (
            torch.softmax(score, dim=1)
            .mul_(p.sum(1, keepdim=True))
            .sub_(p)
            .mul_(dkl_S[block.a : block.b, None].to(p.dtype))
        )
        accumulate_index_gradient(x, block, dscore, dq, dk, dw)
    H, T = q_I.shape[1], k_I.shape[0]
    return dq[:, :H].to(q_I.dtype).contiguous(), dk[:T].to(k_I.dtype), dw[:, :H].to(w.dtype).contiguous()
