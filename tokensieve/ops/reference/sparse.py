"""Attention over selected entries, forward and backward, with the KL of equation (4) that its probabilities give for free.

Legend: S query tokens, T key tokens, H heads, G key-value groups, K selected, D key width, E entry width, V value width; b queries.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tokensieve.ops.reference.blocks import compute_dtype, normalized, row_blocks


class Gathered(NamedTuple):
    """One block's selected entries: keys (b*G, D, K) and values (b*G, K, V), the mask of unused places (b, K) or None, flat indices."""

    entries_bKGE: Tensor
    unused_bK: Tensor | None
    index_bK: Tensor


def gather_entries(kv_TGE: Tensor, indices_bK: Tensor, dtype: torch.dtype) -> Gathered:
    unused = indices_bK < 0
    if not bool(unused.any()):
        index, mask = indices_bK.long(), None
    else:
        index, mask = indices_bK.clamp_min(0).long(), unused
    if kv_TGE.shape[0] == 0:  # no key at all: every place is unused and points at one made up here
        kv_TGE = kv_TGE.new_zeros(1, *kv_TGE.shape[1:])
    entries = kv_TGE.index_select(0, index.flatten()).view(*index.shape, *kv_TGE.shape[1:]).to(dtype)
    return Gathered(entries, mask, index)


def grouped(x_bHD: Tensor, G: int) -> Tensor:
    """(b, H, D) -> (b*G, H/G, D); head h belongs to group h // (H/G)."""
    b, H, D = x_bHD.shape
    return x_bHD.reshape(b * G, H // G, D)


def by_group(x_bKGD: Tensor) -> Tensor:
    """(b, K, G, D) -> (b*G, K, D), a view when G is 1."""
    return x_bKGD.transpose(1, 2).flatten(0, 1)


def selected_logits(q_bHD: Tensor, g: Gathered, scale: float, d_k: int) -> Tensor:
    """scale * q . k (b, H, K), -inf at unused places."""
    b, H, _ = q_bHD.shape
    G = g.entries_bKGE.shape[2]
    keys = by_group(g.entries_bKGE[..., :d_k])
    logits = torch.bmm(grouped(q_bHD, G), keys.transpose(1, 2)).mul_(scale).view(b, H, -1)
    return logits if g.unused_bK is None else logits.masked_fill_(g.unused_bK[:, None, :], float("-inf"))


def probabilities(logits_bHK: Tensor, lse_bH: Tensor) -> Tensor:
    """Softmax over K, zeros for a query without keys. Not exp(logits - lse): at logits of 1e4 lse has too few digits left."""
    return torch.softmax(logits_bHK, dim=-1).masked_fill_((lse_bH == float("-inf")).unsqueeze(-1), 0.0)


def sparse_attention(
    q_SHD: Tensor, kv_TGE: Tensor, indices_SK: Tensor, scale: float, d_k: int, v_start: int, d_v: int
) -> tuple[Tensor, Tensor]:
    S, H, _ = q_SHD.shape
    G, E, K = kv_TGE.shape[1], kv_TGE.shape[2], indices_SK.shape[1]
    dtype = compute_dtype(q_SHD)
    out_SHV, lse_SH = q_SHD.new_empty(S, H, d_v), q_SHD.new_empty(S, H, dtype=dtype)
    for a, b in row_blocks(S, K * max(G * E, H), q_SHD):
        g = gather_entries(kv_TGE, indices_SK[a:b], dtype)
        logits = selected_logits(q_SHD[a:b].to(dtype), g, scale, d_k)
        lse = torch.logsumexp(logits, dim=-1)
        p = probabilities(logits, lse)
        values = by_group(g.entries_bKGE[..., v_start : v_start + d_v])
        out_SHV[a:b] = torch.bmm(grouped(p, G), values).view(b - a, H, d_v)
        lse_SH[a:b] = lse
    return out_SHV, lse_SH


def selected_index_dots(q_I: Tensor, k_I: Tensor, index_bK: Tensor) -> tuple[Tensor, Tensor]:
    """relu(q_I . k_I) at the selected keys (b, H_I, K), and those keys (b, K, D)."""
    if k_I.shape[0] == 0:
        k_I = k_I.new_zeros(1, k_I.shape[1])
    keys = k_I.index_select(0, index_bK.flatten()).view(*index_bK.shape, k_I.shape[1])
    return torch.bmm(q_I, keys.transpose(1, 2)).relu_(), keys


def selected_kl(p_bHK: Tensor, score_bK: Tensor, unused_bK: Tensor | None) -> tuple[Tensor, Tensor]:
    """Equation (4) of one block: KL(p || softmax(score)) (b), and its gradient by the scores, softmax * sum(p) - p (b, K)."""
    target = p_bHK.mean(dim=1)
    if unused_bK is not None:
        score_bK = score_bK.masked_fill(unused_bK, float("-inf"))
    lse = torch.logsumexp(score_bK, dim=-1)
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    mass = target.sum(dim=-1)
    cross = target * (score_bK if unused_bK is None else score_bK.masked_fill(unused_bK, 0.0))
    kl = torch.xlogy(target, target).sum(-1) - cross.sum(-1) + lse * mass
    return kl, torch.exp(score_bK - lse[:, None]) * mass[:, None] - target


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
    S, H, _ = q_SHD.shape
    G, E, K = kv_TGE.shape[1], kv_TGE.shape[2], indices_SK.shape[1]
    dtype = compute_dtype(q_SHD)
    out_SHV, lse_SH = q_SHD.new_empty(S, H, d_v), q_SHD.new_empty(S, H, dtype=dtype)
    kl_S = torch.zeros(S, dtype=dtype, device=q_SHD.device)
    k_I = k_I.to(dtype)
    for a, b in row_blocks(S, K * max(G * E, H, k_I.shape[1]), q_SHD):
        g = gather_entries(kv_TGE, indices_SK[a:b], dtype)
        logits = selected_logits(q_SHD[a:b].to(dtype), g, scale, d_k)
        lse = torch.logsumexp(logits, dim=-1)
        p = probabilities(logits, lse)
        values = by_group(g.entries_bKGE[..., v_start : v_start + d_v])
        out_SHV[a:b] = torch.bmm(grouped(p, G), values).view(b - a, H, d_v)
        lse_SH[a:b] = lse
        dots, _ = selected_index_dots(q_I[a:b].to(dtype), k_I, g.index_bK)
        score = torch.bmm(w[a:b, None].to(dtype), dots).squeeze(1)
        kl_S[a:b] = selected_kl(p, score, g.unused_bK)[0]
    return out_SHV, lse_SH, kl_S


def sparse_attention_backward(
    dout_SHV: Tensor,
    dlse_SH: Tensor | None,
    q_SHD: Tensor,
    kv_TGE: Tensor,
    indices_SK: Tensor,
    out_SHV: Tensor,
    lse_SH: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
) -> tuple[Tensor, Tensor]:
    dq, dkv, *_ = sparse_attention_kl_backward(
        dout_SHV, dlse_SH, None, q_SHD, kv_TGE, indices_SK, out_SHV, lse_SH, scale, d_k, v_start, d_v, None, None, None
    )
    return dq, dkv


def sparse_attention_kl_backward(
    dout_SHV: Tensor,
    dlse_SH: Tensor | None,
    dkl_S: Tensor | None,
    q_SHD: Tensor,
    kv_TGE: Tensor,
    indices_SK: Tensor,
    out_SHV: Tensor,
    lse_SH: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
    q_I: Tensor | None,
    k_I: Tensor | None,
    w: Tensor | None,
) -> tuple[Tensor, ...]:
    """dq, dkv of the attention, and with `dkl_S` also dq_I, dk_I, dw of equation (4), from one recomputation of the probabilities."""
    S, H, _ = q_SHD.shape
    T, G, E = kv_TGE.shape
    K = indices_SK.shape[1]
    dtype = compute_dtype(q_SHD)
    dq_SHD, dkv_TGE = q_SHD.new_empty(q_SHD.shape), torch.zeros(max(T, 1), G, E, dtype=dtype, device=q_SHD.device)
    if dkl_S is not None:
        assert q_I is not None and k_I is not None and w is not None
        dq_I, dw = q_I.new_empty(q_I.shape), w.new_empty(w.shape)
        dk_I = torch.zeros(max(T, 1), k_I.shape[1], dtype=dtype, device=k_I.device)
        k_I32 = k_I.to(dtype)
    for a, b in row_blocks(S, K * max(G * E, H), q_SHD):
        g = gather_entries(kv_TGE, indices_SK[a:b], dtype)
        q, dout = q_SHD[a:b].to(dtype), dout_SHV[a:b].to(dtype)
        p = normalized(selected_logits(q, g, scale, d_k), lse_SH[a:b].to(dtype))
        keys = by_group(g.entries_bKGE[..., :d_k])
        values = by_group(g.entries_bKGE[..., v_start : v_start + d_v])
        dp = torch.bmm(grouped(dout, G), values.transpose(1, 2)).view(b - a, H, K)
        delta = (dout * out_SHV[a:b].to(dtype)).sum(-1)
        if dlse_SH is not None:
            delta = delta - dlse_SH[a:b].to(dtype)
        ds = (dp - delta.unsqueeze(-1)).mul_(p).mul_(scale)
        dq_SHD[a:b] = torch.bmm(grouped(ds, G), keys).view(b - a, H, d_k)
        dentry = g.entries_bKGE.new_zeros(b - a, G, K, E)
        dentry[..., :d_k] = torch.bmm(grouped(ds, G).transpose(1, 2), grouped(q, G)).view(b - a, G, K, d_k)
        dentry[..., v_start : v_start + d_v] += torch.bmm(grouped(p, G).transpose(1, 2), grouped(dout, G)).view(
            b - a, G, K, d_v
        )
        # Unused places point at key 0 with probability 0: they add zeros.
        dkv_TGE.index_add_(0, g.index_bK.flatten(), dentry.transpose(1, 2).reshape(-1, G, E))
        if dkl_S is not None:
            assert q_I is not None and w is not None
            qi, wi = q_I[a:b].to(dtype), w[a:b].to(dtype)
            dots, index_keys = selected_index_dots(qi, k_I32, g.index_bK)
            score = torch.bmm(wi[:, None], dots).squeeze(1)
            dscore = selected_kl(p, score, g.unused_bK)[1] * dkl_S[a:b, None].to(dtype)
            dw[a:b] = torch.bmm(dots, dscore.unsqueeze(-1)).squeeze(-1)
            d_bHK = dots.sign_().mul_(dscore.unsqueeze(1)).mul_(wi.unsqueeze(-1))
            dq_I[a:b] = torch.bmm(d_bHK, index_keys)
            dk_I.index_add_(0, g.index_bK.flatten(), torch.bmm(d_bHK.transpose(1, 2), qi).flatten(0, 1))
    if dkl_S is None:
        return dq_SHD, dkv_TGE[:T].to(kv_TGE.dtype)
    assert k_I is not None
    return dq_SHD, dkv_TGE[:T].to(kv_TGE.dtype), dq_I, dk_I[:T].to(k_I.dtype), dw
