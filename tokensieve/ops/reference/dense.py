"""Dense attention and attention masked to a selection, forward and backward.

Legend: S query tokens, T key tokens, H heads, G key-value groups, D key width, V value width; b queries in a block,
n keys in its range.
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
    softmax_with_lse,
)

Excluded = Callable[[Block], Tensor | None]  # a block's mask (b, n), True for a key that does not take part


def block_logits(q_SHD: Tensor, k_TGD: Tensor, block: Block, scale: float) -> Tensor:
    """scale * q . k (H, b, n); head h uses group h // (H/G)."""
    a, b, lo, hi = block
    G = k_TGD.shape[1]
    dtype = compute_dtype(q_SHD)
    q = q_SHD[a:b].to(dtype).transpose(0, 1).reshape(G, -1, q_SHD.shape[2]) * scale  # scaling q is one pass over q only
    k = k_TGD[lo:hi].to(dtype).permute(1, 2, 0)
    return torch.bmm(q, k).view(q_SHD.shape[1], b - a, hi - lo)


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
        p, lse = softmax_with_lse(logits)
        values = v_TGV[lo:hi].to(dtype).transpose(0, 1)
        out_SHV[a:b] = torch.bmm(grouped_rows(p, G), values).view(H, b - a, V).transpose(0, 1)
        lse_SH[a:b] = lse.t()
    return out_SHV, lse_SH


def block_attention_backward(
    dout_SHV: Tensor,
    dlse_SH: Tensor | None,
    out_SHV: Tensor,
    lse_SH: Tensor,
    q_SHD: Tensor,
    k_TGD: Tensor,
    v_TGV: Tensor,
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
        ds = grouped_rows(dp.sub_(delta.unsqueeze(-1)).mul_(p), G)
        keys = k_TGD[lo:hi].to(dtype).transpose(0, 1)
        dq_SHD[a:b] = torch.bmm(ds, keys).mul_(scale).view(H, b - a, D).transpose(0, 1)
        q = q_SHD[a:b].to(dtype).transpose(0, 1).reshape(G, -1, D) * scale
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
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    starts_S: Tensor, ends_S: Tensor, bounds: Tensor | None, longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return block_attention_backward(dout, dlse, out, lse, q, k, v, scale, *dense_blocks(q, starts_S, ends_S))


def selection_blocks(q_SHD: Tensor, indices_SK: Tensor) -> tuple[Iterator[Block], Excluded]:
    """Blocks over the span of keys that the queries selected, and the mask of the keys that they did not."""

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
            # A block grows while its queries share keys; a query of another document begins a new one.
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
        # An extra column past the range collects the -1s.
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
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices_SK: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return block_attention_backward(dout, dlse, out, lse, q, k, v, scale, *selection_blocks(q, indices_SK))


def head_mass(q_SHD: Tensor, k_TGD: Tensor, starts_S: Tensor, ends_S: Tensor, scale: float) -> Tensor:
    mass_ST = torch.zeros(q_SHD.shape[0], k_TGD.shape[0], dtype=compute_dtype(q_SHD), device=q_SHD.device)
    blocks, excluded = dense_blocks(q_SHD, starts_S, ends_S)
    for block in blocks:
        a, b, lo, hi = block
        logits = block_logits(q_SHD, k_TGD, block, scale)
        mask, first = excluded(block), int(ends_S[a:b].min()) - lo  # all of the block's queries see the keys before
        if mask is not None:
            logits[..., first:].masked_fill_(mask[:, first:], float("-inf"))
        mass_ST[a:b, lo:hi] = softmax_with_lse(logits)[0].mean(0)
    return mass_ST
