"""Index queries for quantized pages in Triton: rotated by position and by Hadamard's matrix, rounded to E4M3, in one
launch.

Legend: S query tokens, H index heads, D index width, R rope width; a program takes HP heads of one query.

Bits are those of `quant.hadamard` and `quant.quantize_e4m3`. As in `paged_write`, a NaN or an infinity makes the scale
NaN instead of raising.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.triton.paged_write import quantized

HEADS = 16  # of a program


@triton.jit
def row_sums_and_differences(x, half: tl.constexpr, HP: tl.constexpr, D: tl.constexpr):
    pairs = tl.permute(tl.reshape(x, (HP, D // (2 * half), 2, half)), (0, 1, 3, 2))
    upper, lower = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(upper + lower, upper - lower), (0, 1, 3, 2)), (HP, D))


@triton.jit
def rows_rotated(x, HP: tl.constexpr, D: tl.constexpr, LEVELS: tl.constexpr):
    """Rows (HP, D = 2^LEVELS) times the Hadamard matrix over sqrt(D), added up in the order of `quant.hadamard`."""
    for level in tl.static_range(0, LEVELS):
        x = row_sums_and_differences(x, 1 << level, HP, D)
    return x * (D**-0.5)


@triton.jit
def _queries_kernel(
    q, w, cos, sin, values, weights, H,
    R: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, LEVELS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h, d = tl.program_id(1) * HP + tl.arange(0, HP), tl.arange(0, D)
    row = q + (t * H + h[:, None]) * D
    x = tl.load(row + d[None, :], mask=h[:, None] < H, other=0.0).to(tl.float32)
    if TURNED:
        roped = d[None, :] < R
        partner = tl.load(row + ((d + R // 2) % R)[None, :], mask=(h[:, None] < H) & roped, other=0.0).to(tl.float32)
        c = tl.load(cos + t * R + d, mask=d < R, other=1.0)[None, :]
        s = tl.load(sin + t * R + d, mask=d < R, other=0.0)[None, :]
        x = tl.where(roped, x * c + partner * s, x).to(q.dtype.element_ty).to(tl.float32)
    x = rows_rotated(x, HP, D, LEVELS).to(q.dtype.element_ty).to(tl.float32)  # rounded as the rotation returns it
    code, scale = quantized(x)
    tl.store(values + (t * H + h[:, None]) * D + d[None, :], code, mask=h[:, None] < H)
    weight = tl.load(w + t * H + h, mask=h < H).to(tl.float32)
    tl.store(weights + t * H + h, weight * scale, mask=h < H)


def quantize_queries(q_SHD: Tensor, w_SH: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor]:
    S, H, D = q_SHD.shape
    values = torch.empty(S, H, D, dtype=torch.uint8, device=q_SHD.device)
    weights = torch.empty(S, H, dtype=torch.float32, device=q_SHD.device)
    if q_SHD.numel():
        R = 0 if cos is None else cos.shape[-1]
        _queries_kernel[(S, triton.cdiv(H, HEADS))](
            q_SHD.contiguous(), w_SH.contiguous(), cos if cos is None else cos.contiguous(),
            sin if sin is None else sin.contiguous(), values, weights, H,
            R=R, D=D, HP=HEADS, LEVELS=D.bit_length() - 1, TURNED=cos is not None, num_warps=2,
        )  # fmt: skip
    return values.view(torch.float8_e4m3fn), weights
