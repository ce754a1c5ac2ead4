"""The indexer's loss of sparse training, equation (4), in Triton: attention over selected entries, and its KL.

Legend: S queries, T key tokens, H heads, G key-value groups, K selected. A program holds one query.

Forward needs the probabilities summed over heads once more after the logsumexp is known; in backward they come with dq.
Only rows of K are ever stored, in backward one (S, K) per block of heads. `index_kl` has what is done with them.
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
    widths,
)
from tokensieve.ops.triton.index import exact
from tokensieve.ops.triton.index_kl import selected_kl, selected_kl_backward


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
            # SHARED whatever the entry is, so that no value is loaded: only keys are needed
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
    if S == 0:
        return out, lse, lse.new_zeros(0)
    q, kv, indices, q_I, k_I, w = (x.contiguous() for x in (q_SHD, kv_TGE, indices_SK, q_I, k_I, w))
    mass = torch.empty(S, K, dtype=torch.float32, device=q.device)
    _mass_kernel[(S * triton.cdiv(K, 64),)](
        q, kv, indices, lse, mass, T, K, scale,
        H=H, G=G, E=E, d_k=d_k, v_start=v_start, d_v=d_v, **widths(d_k, v_start, d_v),
        BH=min(32, head_block(H // G)), BN=64, EXACT=exact(q), num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, lse, selected_kl(mass, H, q_I, k_I, w, indices)


def sparse_attention_kl_backward(
    dout_SHV: Tensor,
    dlse_SH: Tensor | None,
    dkl_S: Tensor,
    out_SHV: Tensor,
    lse_SH: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dkv, mass = backward_with_mass(
        dout_SHV, dlse_SH, out_SHV, lse_SH, q_SHD, kv_TGE, indices_SK, scale, d_k, v_start, d_v, with_mass=True
    )
    if q_SHD.shape[0] == 0:
        return dq, dkv, torch.zeros_like(q_I), torch.zeros_like(k_I), torch.zeros_like(w)
    assert mass is not None
    indexer = (x.contiguous() for x in (q_I, k_I, w, indices_SK))
    dq_I, dk_I, dw = selected_kl_backward(dkl_S.contiguous(), mass, q_SHD.shape[1], *indexer)
    return dq, dkv, dq_I, dk_I.to(k_I.dtype), dw
