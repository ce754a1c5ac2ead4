"""Products with weights in FP8 blocks, in Triton: one launch rounds the activations, a second multiplies them.

Legend: N rows, E weights, M outputs, K inputs, in blocks of 128; BM outputs and BN rows of a program.

The weight's rows are the rows of the product and the tokens its columns: tensor cores take 64 rows at least, and decode
has fewer tokens than that. A block's product is added to the sum in float32 by ordinary cores, times both scales:
Hopper's own accumulators have fewer bits for FP8.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.triton.paged_write import quantized

BLOCK: tl.constexpr = tl.constexpr(128)
GROUPS = 16  # blocks of a row that a program rounds
TOGETHER: tl.constexpr = tl.constexpr(16)  # tiles of rows


@triton.jit
def _round_kernel(x, values, scales, blocks, stride, GB: tl.constexpr, GATED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * GB + tl.arange(0, GB)
    at = g[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = g[:, None] < blocks
    part = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(x + row * stride + blocks * BLOCK + at, mask=inside, other=0.0)
        gate = (part / (1 + tl.exp(-part))).to(x.dtype.element_ty)  # rounded as F.silu gives it
        part = (gate * up).to(x.dtype.element_ty).to(tl.float32)
    code, scale = quantized(part)
    tl.store(values + row * blocks * BLOCK + at, code, mask=inside)
    tl.store(scales + row * blocks + g, scale, mask=g < blocks)


@triton.jit
def _product_kernel(
    values, scales, weight, weight_scales, ends, out, rows, M, K, row_tiles,
    E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # Programs go through TOGETHER tiles of rows with all of the weight, then the next TOGETHER: what they read at the
    # same time stays in the L2 cache.
    group = TOGETHER * tl.cdiv(M, BM)
    first = tl.program_id(0) // group * TOGETHER
    together = tl.minimum(row_tiles - first, TOGETHER)
    m_tile = tl.program_id(0) % group // together
    tile, expert, begin, end = first + tl.program_id(0) % group % together, 0, 0, rows
    if E > 1:
        # Which weight a tile of rows belongs to: each weight has as many tiles as its rows fill.
        e = tl.arange(0, EP)
        upper = tl.load(ends + e, mask=e < E, other=0)
        lower = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
        tiles = tl.where(e < E, (upper - lower + BN - 1) // BN, 0)
        past = tl.cumsum(tiles, 0)
        expert = tl.sum((past <= tile).to(tl.int32), 0)
        mine = e == expert
        tile -= tl.sum(tl.where(mine, past - tiles, 0), 0)
        begin, end = tl.sum(tl.where(mine, lower, 0), 0), tl.sum(tl.where(mine, upper, 0), 0)
    if expert < E:
        blocks = K // BLOCK
        m = m_tile * BM + tl.arange(0, BM)
        n = (begin + tile * BN + tl.arange(0, BN)).to(tl.int64)
        k = tl.arange(0, BLOCK)
        inside = n < end
        row = tl.where(inside, n, 0)
        # Outputs past the last are computed from row 0 and not stored.
        from_weight = (
            weight + tl.cast(expert, tl.int64) * M * K + tl.where(m < M, m, 0).to(tl.int64)[:, None] * K + k[None, :]
        )
        from_values = values + row[:, None] * K + k[None, :]
        from_scales = weight_scales + (expert * tl.cdiv(M, BLOCK) + m_tile * BM // BLOCK) * blocks
        total = tl.zeros((BM, BN), tl.float32)
        for block in range(blocks):
            w = tl.load(from_weight + block * BLOCK)
            x = tl.load(from_values + block * BLOCK)
            s = tl.load(scales + row * blocks + block) * tl.load(from_scales + block)
            total += tl.dot(w, tl.trans(x)) * s[None, :]
        to = out + n[None, :] * M + m[:, None]
        tl.store(to, total.to(out.dtype.element_ty), mask=inside[None, :] & (m < M)[:, None])


def tile_of(rows: int, weights: int) -> tuple[int, int, int, int]:
    """Outputs and rows of a program, its warps and its stages, by the rows that a weight has on average."""
    each = -(-rows // weights)
    if each <= 16:
        return 64, 16, 4, 6
    if each <= 32:
        return 64, 32, 4, 5
    if each <= 64:
        return 64, 64, 4, 4
    return 128, 64, 4, 4  # two programs to a multiprocessor: one multiplies while the other adds


def rounded(x_NK: Tensor, K: int, gated: bool) -> tuple[Tensor, Tensor]:
    """The operands of the product: values (N, K) E4M3 and scales (N, K / 128)."""
    x, N, blocks = x_NK.contiguous(), x_NK.shape[0], K // BLOCK.value
    values = torch.empty(N, K, dtype=torch.uint8, device=x.device)
    scales = torch.empty(N, blocks, dtype=torch.float32, device=x.device)
    GB = min(GROUPS, triton.next_power_of_2(blocks))
    _round_kernel[(N, triton.cdiv(blocks, GB))](x, values, scales, blocks, x.shape[1], GB=GB, GATED=gated, num_warps=4)
    return values.view(torch.float8_e4m3fn), scales


def block_linear(x_NK: Tensor, weight_EMK: Tensor, scale: Tensor, ends_E: Tensor | None, gated: bool) -> Tensor:
    (E, M, K), N = weight_EMK.shape, x_NK.shape[0]
    out = torch.empty(N, M, dtype=x_NK.dtype, device=x_NK.device)
    if 0 in (N, M):
        return out
    values, scales = rounded(x_NK, K, gated)
    BM, BN, warps, stages = tile_of(N, E)
    # The most tiles of rows there can be: the last one of each weight may not be full.
    tiles = triton.cdiv(N, BN) if E == 1 else min(N, triton.cdiv(N, BN) + E)
    _product_kernel[(triton.cdiv(M, BM) * tiles,)](
        values, scales, weight_EMK, scale, ends_E, out, N, M, K, tiles,
        E=E, EP=triton.next_power_of_2(E), BM=BM, BN=BN, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
