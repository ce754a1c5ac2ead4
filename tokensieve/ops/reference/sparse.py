"""Attention over selected entries, forward and backward, and the KL of equation (4), cheap beside its probabilities.

Legend: S query tokens, T key tokens, H heads, G key-value groups, M heads of a group, K selected, D key width, E entry
width, V value width; b queries in a block.

Each entry is gathered once per query and direction, and few, wide products read it from there: reading is what this
costs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokensieve.ops.eager import is_single_token
from tokensieve.ops.reference.blocks import compute_dtype, row_blocks, softmax_with_lse
from tokensieve.ops.reference.kl import open_gradient, weighted_gradients


def selected_rows(x_TX: Tensor, indices_bK: Tensor) -> Tensor:
    """Rows (b, K, X) of the selected tokens; an unused place reads token 0, which every caller masks."""
    if x_TX.shape[0] == 0:  # no key at all: every place is unused and points at a row of zeros
        x_TX = x_TX.new_zeros(1, x_TX.shape[1])
    return x_TX.index_select(0, indices_bK.clamp_min(0).flatten()).view(*indices_bK.shape, x_TX.shape[1])


def by_group(rows_bKX: Tensor, G: int) -> Tensor:
    """(b, K, G*E) -> (b*G, K, E), a view when G is 1."""
    return rows_bKX.unflatten(2, (G, -1)).transpose(1, 2).flatten(0, 1)


def grouped(x_bHD: Tensor, G: int) -> Tensor:
    """(b, H, D) -> (b*G, M, D); head h belongs to group h // M."""
    b, H, D = x_bHD.shape
    return x_bHD.reshape(b * G, H // G, D)


def attend(
    q_bHD: Tensor, entries_BKE: Tensor, unused_bK: Tensor, v_start: int, d_v: int
) -> tuple[Tensor, Tensor, Tensor]:
    """out (b, H, V), lse (b, H) and probabilities (b, H, K) of scaled queries over gathered entries (b*G, K, E)."""
    b, H, d_k = q_bHD.shape
    G = entries_BKE.shape[0] // b
    logits = torch.bmm(grouped(q_bHD, G), entries_BKE[..., :d_k].transpose(1, 2)).view(b, H, -1)
    logits.masked_fill_(unused_bK[:, None], float("-inf"))
    p, lse = softmax_with_lse(logits)
    out = torch.bmm(grouped(p, G), entries_BKE[..., v_start : v_start + d_v]).view(b, H, d_v)
    return out, lse, p


def attend_alone(
    q_1HD: Tensor, kv_TGE: Tensor, indices_1K: Tensor, scale: float, d_k: int, v_start: int, d_v: int
) -> tuple[Tensor, Tensor]:
    """`sparse_attention` of one query whose places are all used, as in decode.

    It takes a third of the operators, and those are what it costs.
    """
    G, dtype = kv_TGE.shape[1], compute_dtype(q_1HD)
    entries_KGE = kv_TGE.index_select(0, indices_1K[0]).to(dtype)
    q_GMD = (q_1HD.to(dtype) * scale).view(G, -1, d_k)
    logits = torch.bmm(q_GMD, entries_KGE[..., :d_k].permute(1, 2, 0))
    p = logits.softmax(-1)
    out = torch.bmm(p, entries_KGE[..., v_start : v_start + d_v].transpose(0, 1))
    lse = logits.amax(-1) - p.amax(-1).log()  # the largest logit's share is exp(largest - lse)
    return out.to(q_1HD.dtype).view(1, -1, d_v), lse.view(1, -1)


def selected_scores(q_bHD: Tensor, w_bH: Tensor, keys_bKD: Tensor) -> tuple[Tensor, Tensor]:
    """Index scores (b, K) of the selected keys and the relu'd products (b, H, K) that they sum."""
    dots = torch.bmm(q_bHD, keys_bKD.transpose(1, 2)).relu_()
    return torch.bmm(w_bH.unsqueeze(1), dots).squeeze(1), dots


def selected_kl(p_bHK: Tensor, score_bK: Tensor, unused_bK: Tensor) -> tuple[Tensor, Tensor]:
    """Equation (4) of one block: KL(p || softmax(score)) (b), and its gradient by the scores (b, K).

    That gradient is softmax(score) * sum(p) - p.
    """
    target = p_bHK.mean(dim=1)
    cross = (target * score_bK.masked_fill(unused_bK, 0.0)).sum(-1)
    score_bK = score_bK.masked_fill(unused_bK, float("-inf"))
    lse = torch.logsumexp(score_bK, dim=-1)
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    mass = target.sum(dim=-1)
    kl = torch.xlogy(target, target).sum(-1) - cross + lse * mass
    return kl, torch.exp(score_bK - lse[:, None]) * mass[:, None] - target


def sparse_attention(
    q_SHD: Tensor, kv_TGE: Tensor, indices_SK: Tensor, scale: float, d_k: int, v_start: int, d_v: int
) -> tuple[Tensor, Tensor]:
    S, H, _ = q_SHD.shape
    G, K = kv_TGE.shape[1], indices_SK.shape[1]
    dtype = compute_dtype(q_SHD)
    if K and is_single_token(q_SHD) and int(indices_SK.min()) >= 0:
        return attend_alone(q_SHD, kv_TGE, indices_SK, scale, d_k, v_start, d_v)
    out_SHV, lse_SH = q_SHD.new_empty(S, H, d_v), q_SHD.new_empty(S, H, dtype=dtype)
    for a, b in row_blocks(S, K * max(kv_TGE[:1].numel(), H), q_SHD):
        entries = by_group(selected_rows(kv_TGE.flatten(1), indices_SK[a:b]).to(dtype), G)
        out_SHV[a:b], lse_SH[a:b], _ = attend(q_SHD[a:b].to(dtype) * scale, entries, indices_SK[a:b] < 0, v_start, d_v)
    return out_SHV, lse_SH


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
    for a, b in row_blocks(S, K * max(G * E, H, *q_I.shape[1:]), q_SHD):
        indices = indices_SK[a:b]
        unused = indices < 0
        entries = by_group(selected_rows(kv_TGE.flatten(1), indices).to(dtype), G)
        out_SHV[a:b], lse_SH[a:b], p = attend(q_SHD[a:b].to(dtype) * scale, entries, unused, v_start, d_v)
        index_keys = selected_rows(k_I, indices).to(dtype)
        score, _ = selected_scores(q_I[a:b].to(dtype), w[a:b].to(dtype), index_keys)
        kl_S[a:b], _ = selected_kl(p, score, unused)
    return out_SHV, lse_SH, kl_S


def sparse_attention_backward(
    dout_SHV: Tensor,
    dlse_SH: Tensor | None,
    out_SHV: Tensor,
    lse_SH: Tensor,
    q_SHD: Tensor,
    kv_TGE: Tensor,
    indices_SK: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
) -> tuple[Tensor, Tensor]:
    dq, dkv, *_ = sparse_attention_kl_backward(
        dout_SHV, dlse_SH, None, out_SHV, lse_SH, q_SHD, kv_TGE, indices_SK, scale, d_k, v_start, d_v, None, None, None
    )
    return dq, dkv


def sparse_attention_kl_backward(
    dout_SHV: Tensor,
    dlse_SH: Tensor | None,
    dkl_S: Tensor | None,
    out_SHV: Tensor,
    lse_SH: Tensor,
    q_SHD: Tensor,
    kv_TGE: Tensor,
    indices_SK: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
    q_I: Tensor | None,
    k_I: Tensor | None,
    w: Tensor | None,
) -> tuple[Tensor, ...]:
    """dq and dkv of the attention; with `dkl_S` also dq_I, dk_I and dw of equation (4).

    The probabilities are recomputed once for all of them.
    """
    S, H, _ = q_SHD.shape
    T, G, E = kv_TGE.shape
    K, M = indices_SK.shape[1], H // G
    dtype = compute_dtype(q_SHD)
    dq_SHD = q_SHD.new_empty(q_SHD.shape)
    dkv_TX = torch.zeros(max(T, 1), G * E, dtype=dtype, device=q_SHD.device)
    if dkl_S is not None:
        assert q_I is not None and k_I is not None and w is not None
        dq_I, dw = q_I.new_empty(q_I.shape), w.new_empty(w.shape)
        dk_I = torch.zeros(max(T, 1), k_I.shape[1], dtype=dtype, device=k_I.device)
    for a, b in row_blocks(S, K * max(G * E, 2 * H), q_SHD):
        indices = indices_SK[a:b]
        unused, index = indices < 0, indices.clamp_min(0).flatten().long()
        entries = by_group(selected_rows(kv_TGE.flatten(1), indices).to(dtype), G)
        # Padded to an entry's width, queries and output gradients share one product each way.
        q = grouped(F.pad(q_SHD[a:b].to(dtype) * scale, (0, E - d_k)), G)
        dout = grouped(F.pad(dout_SHV[a:b].to(dtype), (v_start, E - v_start - d_v)), G)
        both = torch.bmm(torch.cat((q, dout), dim=1), entries.transpose(1, 2))
        p, ds = both.view(b - a, G, 2, M, K).unbind(2)  # the logits and d(p) at first
        lse = lse_SH[a:b].to(dtype)
        lse = lse.masked_fill(lse == float("-inf"), 0.0).view(b - a, G, M, 1)
        p.sub_(lse).exp_().masked_fill_(unused[:, None, None], 0.0)
        delta = (dout_SHV[a:b].to(dtype) * out_SHV[a:b].to(dtype)).sum(-1)
        if dlse_SH is not None:
            delta = delta - dlse_SH[a:b].to(dtype)
        ds.sub_(delta.view(b - a, G, M, 1)).mul_(p)
        dq = torch.bmm(both[:, M:], entries[..., :d_k]).mul_(scale)
        dq_SHD[a:b] = dq.view(b - a, H, d_k)
        dentries = torch.bmm(both.transpose(1, 2), torch.cat((dout, q), dim=1))
        # Unused places point at key 0 with probability 0: they add zeros.
        dkv_TX.index_add_(0, index, dentries.view(b - a, G, K, E).transpose(1, 2).reshape(-1, G * E))
        if dkl_S is not None:
            assert q_I is not None and k_I is not None and w is not None
            qi, wi, keys = q_I[a:b].to(dtype), w[a:b].to(dtype), selected_rows(k_I, indices).to(dtype)
            score, dots = selected_scores(qi, wi, keys)
            dscore = selected_kl(p.reshape(b - a, H, K), score, unused)[1].mul_(dkl_S[a:b, None].to(dtype))
            opened = open_gradient(dots, dscore)
            dq_I[a:b], dw[a:b] = weighted_gradients(torch.bmm(opened, keys), qi, wi)
            dk_I.index_add_(0, index, torch.bmm(opened.transpose(1, 2), qi * wi.unsqueeze(-1)).flatten(0, 1))
    if dkl_S is None:
        return dq_SHD, dkv_TX[:T].view(T, G, E).to(kv_TGE.dtype)
    assert k_I is not None
    return dq_SHD, dkv_TX[:T].view(T, G, E).to(kv_TGE.dtype), dq_I, dk_I[:T].to(k_I.dtype), dw
