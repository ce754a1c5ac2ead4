"""The ops `sparse_attention` and its backward on Hopper.

Legend: S queries, T key tokens, H heads, K selected.

Backward goes through the queries in strips. The probabilities and slopes that its first half hands to the second are as
large as S x H x K, so those of only one strip are held at a time.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.hopper.dkv import HEADS, add_dkv
from tokensieve.ops.hopper.dq import probabilities_and_dq
from tokensieve.ops.hopper.forward import forward
from tokensieve.ops.hopper.limits import aligned
from tokensieve.ops.hopper.warps import KEY, TILE, VALUE
from tokensieve.ops.triton.in_order import add_in_order, strip_length, strips, wanted_in_order


@triton.jit
def _delta_kernel(dout, out, dlse, delta, rows, V: tl.constexpr, BR: tl.constexpr, HAS_DLSE: tl.constexpr):
    """delta = dout . out - dlse, of BR rows."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    mine, at = row < rows, row[:, None] * V + tl.arange(0, V)[None, :]
    a, b = tl.load(dout + at, mask=mine[:, None], other=0.0), tl.load(out + at, mask=mine[:, None], other=0.0)
    sum = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    if HAS_DLSE:
        sum -= tl.load(dlse + row, mask=mine, other=0.0).to(tl.float32)
    tl.store(delta + row, sum, mask=mine)


def delta_of(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """dout . out - dlse, (S, H) float32, of (S, H, V) with V a power of two. Everything contiguous."""
    S, H, V = out.shape
    delta = torch.empty(S, H, dtype=torch.float32, device=out.device)
    if S > 0:
        _delta_kernel[(triton.cdiv(S * H, 16),)](dout, out, dlse, delta, S * H, V=V, BR=16, HAS_DLSE=dlse is not None)
    return delta


def pitch_of(K: int) -> int:
    """How many places a row of probabilities has: whole tiles."""
    return max(1, triton.cdiv(K, TILE)) * TILE


def sparse_attention(
    q_SHD: Tensor, kv_TGE: Tensor, indices_SK: Tensor, scale: float, d_k: int, v_start: int, d_v: int
) -> tuple[Tensor, Tensor]:
    S, H, _ = q_SHD.shape
    out, lse = q_SHD.new_empty(S, H, VALUE), q_SHD.new_empty(S, H, dtype=torch.float32)
    if S > 0:
        forward(q_SHD.contiguous(), aligned(kv_TGE), indices_SK.contiguous(), scale, out, lse)
    return out, lse


def backward_by_strips(
    dout_SHV: Tensor,
    dlse_SH: Tensor | None,
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    out_SHV: Tensor,
    lse_SH: Tensor,
    scale: float,
    dq: Tensor,
    dkv: Tensor,
) -> Iterator[tuple[slice, Tensor]]:
    """Runs backward strip by strip: writes dq, adds to dkv (T, 576) float32, and yields each strip's probabilities.

    Those are (s, H, pitch), unspecified past a query's last used tile. q, kv, indices, dq and dkv are contiguous,
    S > 0.
    """
    (S, H, _), T, K = q.shape, kv.shape[0], indices.shape[1]
    dout, out, lse = dout_SHV.to(q.dtype).contiguous(), out_SHV.contiguous(), lse_SH.contiguous()
    dlse = dlse_SH.contiguous() if dlse_SH is not None else None
    delta = delta_of(dout, out, dlse)
    in_order = wanted_in_order()
    row_bytes = 2 * H * pitch_of(K) * q.element_size() + (triton.cdiv(H, HEADS) * K * KEY * 4 if in_order else 0)
    buffer = q.new_empty(2, strip_length(S, row_bytes), H, pitch_of(K))  # every strip uses it
    for queries in strips(S, row_bytes):
        p, ds = buffer[:, : queries.stop - queries.start]
        part = (dout[queries], q[queries], kv, indices[queries], lse[queries], delta[queries])
        probabilities_and_dq(*part, scale, dq[queries], p, ds)
        if in_order:
            rows = q.new_empty(triton.cdiv(H, HEADS), p.shape[0] * K, KEY, dtype=torch.float32)
            add_dkv(p, ds, dout[queries], q[queries], indices[queries], rows, T, in_order=True)
            for row in rows:
                add_in_order(dkv, indices[queries], row)
        else:
            add_dkv(p, ds, dout[queries], q[queries], indices[queries], dkv, T)
        yield queries, p


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
    q, kv, indices = q_SHD.contiguous(), aligned(kv_TGE), indices_SK.contiguous()
    dq, dkv = torch.empty_like(q), torch.zeros(kv.shape[0], KEY, dtype=torch.float32, device=q.device)
    if q.shape[0] > 0:
        for _ in backward_by_strips(dout_SHV, dlse_SH, q, kv, indices, out_SHV, lse_SH, scale, dq, dkv):
            pass
    return dq, dkv.to(kv.dtype).view_as(kv)
