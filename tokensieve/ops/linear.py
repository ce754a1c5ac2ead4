"""Products with the weights of an FP8 checkpoint, which stay as they are stored; `tokensieve.ops` offers it with the others.

Legend: N rows, E weights, M outputs, K inputs.
"""

import torch
from torch import Tensor

from tokensieve.ops import table
from tokensieve.ops.quant import SCALE_BLOCK


def block_linear(
    x_NK: Tensor,
    weight_EMK: Tensor,
    scale: Tensor,
    ends_E: Tensor | None = None,
    *,
    gated: bool = False,
    backend: str = "auto",
) -> Tensor:
    """y[n,m] = sum_b s_x[n,b] s_w[e,m,b] sum_{k in b} e4m3(x)[n,k] w[e,m,k]: a linear layer, or each row's own of several.

    x (N, K) floating, rounded to E4M3 in blocks of 128 values with power-of-two scales s_x; gated: x is (N, 2K), and what is multiplied is
    silu of its first half times its second. weight (E, M, K) float8_e4m3fn and scale (E, ceil(M / 128), K / 128) float32, s_w of blocks of
    128 x 128, K a multiple of 128. ends (E) int32, ascending: rows [ends[e-1], ends[e]) meet weight e, and what comes of those behind the
    last is any number; None where E = 1. Returns (N, M) in x's dtype, summed in float32. No gradient. ValueError on mismatched shapes and
    dtypes, and in the reference for a NaN or an infinity, which the Triton kernel turns into NaN in that row.
    Sources: the weights of DeepSeek-V3.2-Exp and `fp8_gemm` of its official demo; DeepSeek-V3 report, section 3.3.
    """
    op = "block_linear"
    if weight_EMK.dim() != 3 or weight_EMK.dtype != torch.float8_e4m3fn or weight_EMK.shape[2] % SCALE_BLOCK:
        raise ValueError(
            f"{op}: weight must be (E, M, K) float8_e4m3fn, K a multiple of {SCALE_BLOCK}, got {tuple(weight_EMK.shape)} {weight_EMK.dtype}"
        )
    E, M, K = weight_EMK.shape
    if scale.shape != (E, -(-M // SCALE_BLOCK), K // SCALE_BLOCK) or scale.dtype != torch.float32:
        raise ValueError(
            f"{op}: scale {tuple(scale.shape)} {scale.dtype} does not fit weight {tuple(weight_EMK.shape)}"
        )
    if x_NK.dim() != 2 or x_NK.shape[1] != K * (2 if gated else 1) or not x_NK.is_floating_point():
        raise ValueError(
            f"{op}: x must be (N, {K * (2 if gated else 1)}) floating, got {tuple(x_NK.shape)} {x_NK.dtype}"
        )
    if E == 1:
        right = ends_E is None
    else:
        right = ends_E is not None and ends_E.shape == (E,) and ends_E.dtype == torch.int32
    if not right:
        raise ValueError(f"{op}: ends must be ({E},) int32, or None for one weight")
    return table.block_linear(x_NK, weight_EMK, scale, ends_E, gated, backend)
