"""FP8 blocks, the Hadamard rotation and the bytes of a cache page: functions on tensors, no state.

Shapes: P pages, N rows, K columns, D width; a page holds 64 tokens. The kernels must reproduce what is defined here, so
it favors exactness over speed.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F

E4M3_MAX = 448.0  # the largest finite float8_e4m3fn; the format has no infinity, numbers above 464 become NaN
SCALE_BLOCK = 128
PAGE_TOKENS = 64
LATENT_WIDTH, ROPE_WIDTH, INDEX_WIDTH = 512, 64, 128
LATENT_TOKEN_BYTES = LATENT_WIDTH + LATENT_WIDTH // SCALE_BLOCK * 4 + ROPE_WIDTH * 2  # 656
INDEX_PAGE_BYTES = PAGE_TOKENS * (INDEX_WIDTH + 4)  # 8448

ScaleFormat = Literal["float32", "ue8m0"]


def _scale_of(amax: torch.Tensor, scale_format: ScaleFormat) -> torch.Tensor:
    """Return the float32 scale that maps ``amax`` (float32, positive, finite) to 448, or for ue8m0 to (224, 448]."""
    if scale_format == "float32":
        return amax / E4M3_MAX
    if scale_format != "ue8m0":
        raise ValueError(f"scale_format must be 'float32' or 'ue8m0', not {scale_format!r}")
    # The smallest e with amax <= 448 * 2^e. With amax = m * 2^k, m in [0.5, 1), and 448 = 0.875 * 2^9 this is a
    # comparison of mantissas; a log2 or a product with 1/448 would round and, at amax = 448 * 2^e, pick e + 1.
    mantissa, exponent = torch.frexp(amax)
    exponent = exponent - 9 + (mantissa > 0.875).to(exponent.dtype)
    return torch.ldexp(torch.ones_like(amax), exponent)


def quantize_e4m3(
    x: torch.Tensor, block: int = SCALE_BLOCK, scale_format: ScaleFormat = "float32", amax_floor: float = 1e-4
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to E4M3 with one scale per ``block`` consecutive values of the last axis.

        a = max(amax_floor, max |x_b|),   s = a / 448, or the smallest power of two >= a / 448,   q = e4m3(x_b / s)

    x: (..., D), any floating dtype, finite. Returns values (..., D) float8_e4m3fn and scales (..., ceil(D / block))
    float32; the last block may be shorter. ``scale_format`` "ue8m0" gives the power of two. What is read back differs
    from x by at most max(2^-4 |x|, 2^-10 s) and, with float32 scales, the rounding of one division more.
    Raises ValueError for a NaN or an infinity in x, an unknown format, or a block below 1.
    Source: V3.2-Exp technical report, the FP8 indexer; ``act_quant`` of the official demo.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1, not {block}")
    width = x.shape[-1]
    blocks = F.pad(x.detach().float(), (0, -width % block)).unflatten(-1, (-1, block))
    amax = blocks.abs().amax(-1, keepdim=True)
    if not bool(torch.isfinite(amax).all()):
        raise ValueError("cannot quantize a NaN or an infinity; look for the step that produced it")
    scales = _scale_of(amax.clamp_min(amax_floor), scale_format)
    # The quotient can round to just above 448, and a number above 464 would become NaN: hence the clamp.
    values = (blocks / scales).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return values.flatten(-2)[..., :width].contiguous(), scales.squeeze(-1)


def dequantize_e4m3(
    values: torch.Tensor, scales: torch.Tensor, block: int = SCALE_BLOCK, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Undo :func:`quantize_e4m3`: x = q * s. values (..., D) float8_e4m3fn, scales (..., ceil(D / block)) -> (..., D).

    The product is taken in float32 and rounded to ``dtype`` once. Raises ValueError when the shapes do not match.
    """
    width = values.shape[-1]
    if scales.shape != (*values.shape[:-1], math.ceil(width / block)):
        raise ValueError(f"scales {tuple(scales.shape)} do not fit values {tuple(values.shape)} in blocks of {block}")
    return (values.float() * scales.float().repeat_interleave(block, -1)[..., :width]).to(dtype)


def quantize_weight(
    weight_NK: torch.Tensor, block: tuple[int, int] = (128, 128), scale_format: ScaleFormat = "float32"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix in 2-D blocks, as the published FP8 checkpoints store it.

        W[b] ~ q[b] * scale_inv[b],   scale_inv[b] = max |W[b]| / 448     (1 if the block is all zero)

    weight_NK (N, K) -> values (N, K) float8_e4m3fn and ``weight_scale_inv`` (ceil(N / bn), ceil(K / bk)) float32; edge
    blocks may be smaller. The name says "inv", yet one multiplies by it. Raises ValueError for a NaN or an infinity.
    """
    n, k = weight_NK.shape
    bn, bk = block
    padded = F.pad(weight_NK.detach().float(), (0, -k % bk, 0, -n % bn))
    blocks = padded.unflatten(1, (-1, bk)).unflatten(0, (-1, bn))  # (N / bn, bn, K / bk, bk)
    amax = blocks.abs().amax((1, 3))
    if not bool(torch.isfinite(amax).all()):
        raise ValueError("cannot quantize a weight with a NaN or an infinity")
    scales = torch.where(amax > 0, _scale_of(torch.where(amax > 0, amax, E4M3_MAX), scale_format), 1.0)
    values = (blocks / scales[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return values.flatten(2).flatten(0, 1)[:n, :k].contiguous(), scales


def dequantize_weight(
    weight_NK: torch.Tensor,
    scale_inv: torch.Tensor,
    block: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Undo :func:`quantize_weight`: W = q * scale_inv over blocks (bn, bk). Returns (N, K) in ``dtype``.

    weight_NK (N, K) float8_e4m3fn, scale_inv (ceil(N / bn), ceil(K / bk)). The product is taken in float32 and rounded
    once. Raises ValueError when the shapes do not match.
    """
    n, k = weight_NK.shape
    bn, bk = block
    if scale_inv.shape != (math.ceil(n / bn), math.ceil(k / bk)):
        raise ValueError(f"scale_inv {tuple(scale_inv.shape)} does not fit a weight ({n}, {k}) in blocks of {block}")
    weight = weight_NK.float()
    for row, scales in enumerate(scale_inv.float()):  # a full-size matrix of scales would double the memory
        weight[row * bn : (row + 1) * bn] *= scales.repeat_interleave(bk)[:k]
    return weight.to(dtype)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Rotate the last axis by the normalized Sylvester-Hadamard matrix.

        y = H x / sqrt(D),   H_2n = [[H_n, H_n], [H_n, -H_n]],   H_1 = [1]

    x: (..., D) with D a power of two; returns x.dtype. The matrix is orthogonal, symmetric and its own inverse, so dot
    products survive, while outliers spread over all D values: that is why it comes before FP8. Computed by D log D
    additions in float32 (float64 for float64), differentiable. Raises ValueError for another width.
    Source: ``rotate_activation`` of the official demo.
    """
    width = x.shape[-1]
    if width < 1 or width & (width - 1):
        raise ValueError(f"the Hadamard rotation needs a power-of-two width, not {width}")
    y = x if x.dtype == torch.float64 else x.float()
    half = 1
    while half < width:
        upper, lower = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack((upper + lower, upper - lower), -2).flatten(-3)
        half *= 2
    return (y * width**-0.5).to(x.dtype)


def _check(name: str, x: torch.Tensor, tail: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    if x.dim() != len(tail) + 1 or x.shape[1:] != tail or (dtype is not None and x.dtype != dtype):
        want = f"(P, {', '.join(map(str, tail))})" + (f" {dtype}" if dtype else "")
        raise ValueError(f"{name} must be {want}, not {tuple(x.shape)} {x.dtype}")


def pack_latent_tokens(latent: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
    """The bytes of single tokens of a latent page.

    latent (..., 512) and k_rope (..., 64), floating -> (..., 656) uint8:

        0..511 512 E4M3 | 512..527 4 float32 scales, powers of two, one per 128 values | 528..655 64 bfloat16 rope dims

    in the machine's (little-endian) order. Raises ValueError for a NaN or an infinity in the latent.
    """
    values, scales = quantize_e4m3(latent, SCALE_BLOCK, "ue8m0")
    rope = k_rope.detach().to(torch.bfloat16).contiguous()
    return torch.cat([part.view(torch.uint8) for part in (values, scales, rope)], -1)


def unpack_latent_tokens(
    tokens: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read bytes of :func:`pack_latent_tokens`.

    (..., 656) uint8 -> latent (..., 512) and k_rope (..., 64) in ``dtype``.
    """
    values, scales, rope = tokens.split((LATENT_WIDTH, LATENT_WIDTH // SCALE_BLOCK * 4, ROPE_WIDTH * 2), -1)
    latent = dequantize_e4m3(
        values.contiguous().view(torch.float8_e4m3fn), scales.contiguous().view(torch.float32), SCALE_BLOCK, dtype
    )
    return latent, rope.contiguous().view(torch.bfloat16).to(dtype)


def pack_latent_page(latent: torch.Tensor, k_rope: torch.Tensor) -> torch.Tensor:
    """Write latent cache pages as FlashMLA reads them.

    latent (P, 64, 512) and k_rope (P, 64, 64), floating -> (P, 64, 656) uint8, tokens as :func:`pack_latent_tokens`
    lays them out. Slots without a token: any finite value, zeros by custom. Raises ValueError for other shapes and for
    a NaN or an infinity in the latent. Source: FlashMLA's sparse FP8 decode layout.
    """
    _check("latent", latent, (PAGE_TOKENS, LATENT_WIDTH))
    _check("k_rope", k_rope, (PAGE_TOKENS, ROPE_WIDTH))
    return pack_latent_tokens(latent, k_rope)


def unpack_latent_page(page: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """Read pages of :func:`pack_latent_page`.

    page (P, 64, 656) uint8 -> latent (P, 64, 512) and k_rope (P, 64, 64), both in ``dtype``.
    Raises ValueError for another shape or dtype.
    """
    _check("page", page, (PAGE_TOKENS, LATENT_TOKEN_BYTES), torch.uint8)
    return unpack_latent_tokens(page, dtype)


def index_page_tokens(page: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An index page's bytes by token, as views: (P, 8448) uint8 -> values (P, 64, 128) and scales (P, 64, 4) uint8."""
    values, scales = page.split((PAGE_TOKENS * INDEX_WIDTH, PAGE_TOKENS * 4), -1)
    return values.unflatten(-1, (PAGE_TOKENS, INDEX_WIDTH)), scales.unflatten(-1, (PAGE_TOKENS, 4))


def pack_index_page(k_I: torch.Tensor, scale_format: ScaleFormat = "ue8m0") -> torch.Tensor:
    """Write index-key pages as DeepGEMM reads them.

    k_I (P, 64, 128), floating, already rotated by :func:`hadamard` -> (P, 8448) uint8. Bytes of one page:

        0..8191 64 tokens x 128 E4M3 | 8192..8447 64 float32 scales, one a token

    so a token's scale does not lie beside its values. Slots without a token: zeros by custom. Raises ValueError for
    another shape and for a NaN or an infinity. Source: DeepGEMM's paged MQA logits layout.
    """
    _check("k_I", k_I, (PAGE_TOKENS, INDEX_WIDTH))
    values, scales = quantize_e4m3(k_I, INDEX_WIDTH, scale_format)
    return torch.cat([part.flatten(1).view(torch.uint8) for part in (values, scales)], -1)


def unpack_index_page(page: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Read pages of :func:`pack_index_page`: (P, 8448) uint8 -> k_I (P, 64, 128) float8_e4m3fn, scales (P, 64) float32.

    These are the ``k_TD`` and ``k_scale_T`` of ``index_scores``. Raises ValueError for another shape or dtype.
    """
    _check("page", page, (INDEX_PAGE_BYTES,), torch.uint8)
    values, scales = index_page_tokens(page)
    return values.contiguous().view(torch.float8_e4m3fn), scales.contiguous().view(torch.float32).squeeze(-1)
