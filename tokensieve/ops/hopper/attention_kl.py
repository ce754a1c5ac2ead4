"""The op `sparse_attention_kl` and its backward on Hopper: attention over selected entries, and the indexer's KL,
equation (4).

Legend: S queries, T key tokens, H heads, K selected.

The target needs the probabilities summed over heads. Forward knows them only up to a factor until a row's logsumexp is
known. So it stores them with their tile's largest logit so far, and a second kernel corrects the factor while it sums;
backward has them anyway. Both go through the queries in strips. `tokensieve.ops.triton.index_kl` has what is done with
the sum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.hopper.attention import backward_by_strips, pitch_of
from tokensieve.ops.hopper.forward import forward
from tokensieve.ops.hopper.limits import aligned
from tokensieve.ops.hopper.warps import KEY, TILE, VALUE
from tokensieve.ops.triton.attention import LOG2E, load_index
from tokensieve.ops.triton.in_order import strip_length, strips
from tokensieve.ops.triton.index_kl import selected_kl, selected_kl_backward


@triton.jit(do_not_specialize=["T"])
def _mass_kernel(
    p, top, lse, indices, mass, T, K, pitch,
    H: tl.constexpr, HP: tl.constexpr, BN: tl.constexpr, UNSCALED: tl.constexpr,
):  # fmt: skip
    """The probabilities of one tile of a query's entries, summed over all heads; zeros if a place names no key."""
    tiles, n, head = pitch // BN, tl.arange(0, BN), tl.arange(0, HP)
    t, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    index = load_index(indices + t * K, tile * BN + n, K, T)
    mine, row = head < H, t * H + head
    if tl.max(index) >= 0:
        p_HN = tl.load(p + row[:, None] * pitch + (tile * BN + n)[None, :], mask=mine[:, None], other=0.0).to(
            tl.float32
        )
        if UNSCALED:
            scale_H = tl.exp2(tl.load(top + row * tiles + tile, mask=mine) - tl.load(lse + row, mask=mine) * LOG2E)
            p_HN = tl.where(mine[:, None], p_HN * scale_H[:, None], 0.0)
        tl.store(mass + t * K + tile * BN + n, tl.where(index >= 0, tl.sum(p_HN, 0), 0.0), mask=tile * BN + n < K)


def _summed_over_heads(
    p: Tensor, indices: Tensor, T: int, top: Tensor | None = None, lse: Tensor | None = None
) -> Tensor:
    """(S, K) float32, unspecified in tiles that name no key."""
    (S, H, pitch), K = p.shape, indices.shape[1]
    mass = torch.empty(S, K, dtype=torch.float32, device=p.device)
    _mass_kernel[(S * (pitch // TILE),)](
        p, top, lse, indices, mass, T, K, pitch,
        H=H, HP=triton.next_power_of_2(H), BN=TILE, UNSCALED=top is not None, num_warps=4,
    )  # fmt: skip
    return mass


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
    (S, H, _), T, K = q_SHD.shape, kv_TGE.shape[0], indices_SK.shape[1]
    out, lse = q_SHD.new_empty(S, H, VALUE), q_SHD.new_empty(S, H, dtype=torch.float32)
    if S == 0:
        return out, lse, lse.new_zeros(0)
    q, kv, indices, q_I, k_I, w = (aligned(x) for x in (q_SHD, kv_TGE, indices_SK, q_I, k_I, w))
    mass = torch.empty(S, K, dtype=torch.float32, device=q.device)
    pitch = pitch_of(K)
    row_bytes = H * pitch * q.element_size()
    buffer_p = q.new_empty(strip_length(S, row_bytes), H, pitch)  # every strip uses it
    buffer_top = q.new_empty(buffer_p.shape[0], H, pitch // TILE, dtype=torch.float32)
    for part in strips(S, row_bytes):
        p, top = buffer_p[: part.stop - part.start], buffer_top[: part.stop - part.start]
        forward(q[part], kv, indices[part], scale, out[part], lse[part], (p, top))
        mass[part] = _summed_over_heads(p, indices[part], T, top, lse[part])
    return out, lse, selected_kl(mass, H, q_I, k_I, w, indices)


def gradients(
    dout_SHV: Tensor, dlse_SH: Tensor | None, dkl_S: Tensor, out_SHV: Tensor, lse_SH: Tensor, q: Tensor, kv: Tensor,
    indices: Tensor, scale: float, q_I: Tensor, k_I: Tensor, w: Tensor, dq: Tensor, dkv: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Writes dq, adds to dkv (T, 576) float32, and returns dq_I, dk_I (float32) and dw. q to w contiguous, S > 0."""
    (S, H, _), T, K = q.shape, kv.shape[0], indices.shape[1]
    mass = torch.empty(S, K, dtype=torch.float32, device=q.device)
    for part, p in backward_by_strips(dout_SHV, dlse_SH, q, kv, indices, out_SHV, lse_SH, scale, dq, dkv):
        mass[part] = _summed_over_heads(p, indices[part], T)
    return selected_kl_backward(dkl_S.contiguous(), mass, H, q_I, k_I, w, indices)


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
    q, kv, indices, q_I, k_I, w = (aligned(x) for x in (q_SHD, kv_TGE, indices_SK, q_I, k_I, w))
    S, T = q.shape[0], kv.shape[0]
    dq, dkv = torch.empty_like(q), torch.zeros(T, KEY, dtype=torch.float32, device=q.device)
    if S == 0:
        return dq, torch.zeros_like(kv), torch.zeros_like(q_I), torch.zeros_like(k_I), torch.zeros_like(w)
    dq_I, dk_I, dw = gradients(
        dout_SHV, dlse_SH, dkl_S, out_SHV, lse_SH, q, kv, indices, scale, q_I, k_I, w, dq, dkv
    )  # fmt: skip
    return dq, dkv.to(kv.dtype).view_as(kv), dq_I, dk_I.to(k_I.dtype), dw
