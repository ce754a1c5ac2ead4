"""Index scores of E4M3 queries and keys, equation (1): the op `index_scores`, and `index_topk` on top of it.

Legend: S query tokens, T key tokens, H index heads, N = 256 query heads of a program, BQ = N / H its queries.

Eight warps form two groups. Keys are the rows of a product; each group has half of the query heads as columns. The
tensor memory accelerator brings keys in tiles of 512, two buffers deep. They are multiplied 64 at a time, two products
under way: one runs while the sum over heads of the other is taken. Product and sum have the order of the portable
kernel, and so a score has its bits.
"""

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tokensieve.ops.hopper.limits import aligned
from tokensieve.ops.hopper.warps import allocate_barriers, barrier, columns, copy_box
from tokensieve.ops.triton import topk
from tokensieve.ops.triton.index import ROWS, chunks, ranges

WIDTH: gl.constexpr = gl.constexpr(128)  # bytes of a key, and of one head of a query
TILE: gl.constexpr = gl.constexpr(512)
STAGES: gl.constexpr = gl.constexpr(2)
SWIZZLED: gl.constexpr = gl.constexpr(gl.NVMMASharedLayout(128, 8, 2))
NAN_STAYS: gl.constexpr = gl.constexpr(tl.PropagateNan.ALL)


@gluon.jit
def _block_range(starts, ends, first, S, T, BQ: gl.constexpr):
    """The keys [lo, hi) that any of BQ queries sees; lo >= hi if none sees any."""
    lo, hi = T, 0
    for i in gl.static_range(BQ):
        mine = first + i < S
        start = gl.maximum(gl.load(starts + first + i, mask=mine, other=0), 0)
        end = gl.minimum(gl.load(ends + first + i, mask=mine, other=0), T)
        lo = gl.where(end > start, gl.minimum(lo, start), lo)
        hi = gl.where(end > start, gl.maximum(hi, end), hi)
    return lo, hi


@gluon.jit
def _fetch(keys, buffer, full, key, exists):
    mbarrier.expect(full, TILE * WIDTH, exists)
    copy_box(keys, [key, 0], full, buffer, exists)


@gluon.jit
def _write(dots, w, k_scale, out, first, key, S, T, H: gl.constexpr):
    """Stores sum_j w[j] relu(dots[j]) times the key's scale, of 64 keys and all queries.

    It stores from the registers in which the sums are.
    """
    opened = gl.maximum(dots, 0.0, propagate_nan=NAN_STAYS) * w[None, :]
    score = gl.sum(gl.reshape(opened, (64, dots.shape[1] // H, H)), 2)
    layout: gl.constexpr = score.type.layout
    t = first + gl.arange(0, score.shape[1], gl.SliceLayout(0, layout))
    n = key + gl.arange(0, 64, gl.SliceLayout(1, layout))
    score *= gl.load(k_scale + n, mask=n < T, other=0.0)[:, None]
    gl.store(out + t.to(gl.int64)[None, :] * T + n[:, None], score, mask=(t < S)[None, :] & (n < T)[:, None])


@gluon.jit
def scores_kernel(queries, keys, w, k_scale, starts, ends, out, S, T, chunk, H: gl.constexpr):
    N: gl.constexpr = queries.block_shape[0]
    BQ: gl.constexpr = N // H
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, N // 2, 32])
    # The last queries, which see most, come first: the programs that end alone are then short.
    first = (gl.num_programs(0) - 1 - gl.program_id(0)) * BQ
    q = gl.allocate_shared_memory(queries.dtype, [N, WIDTH], SWIZZLED)
    tiles_shared = gl.allocate_shared_memory(queries.dtype, [STAGES, TILE, WIDTH], SWIZZLED)
    full = allocate_barriers(STAGES + 1, 1)  # of each tile, and of the queries
    fence_async_shared()
    mbarrier.expect(full.index(STAGES), N * WIDTH)
    copy_box(queries, [first * H, 0], full.index(STAGES), q)
    head = first * H + columns(sums, N)
    w_N = gl.load(w + head, mask=head < S * H, other=0.0).to(gl.float32)
    lo, hi = _block_range(starts, ends, first, S, T, BQ)
    lo = gl.maximum(lo // TILE * TILE, gl.program_id(1) * chunk)
    hi = gl.minimum(hi, gl.program_id(1) * chunk + chunk)
    tiles = gl.cdiv(gl.maximum(hi - lo, 0), TILE)
    for i in gl.static_range(STAGES):
        _fetch(keys, tiles_shared.index(i), full.index(i), lo + i * TILE, i < tiles)
    q = q.permute((1, 0))
    zero = gl.zeros([64, N], gl.float32, sums)
    mbarrier.wait(full.index(STAGES), 0)
    for i in range(tiles):
        stage, key = i % STAGES, lo + i * TILE
        tile, arrived = tiles_shared.index(stage), full.index(stage)
        mbarrier.wait(arrived, i // STAGES & 1)
        a = warpgroup_mma(tile.slice(0, 64, 0), q, zero, use_acc=False, is_async=True)
        b = warpgroup_mma(tile.slice(64, 64, 0), q, zero, use_acc=False, is_async=True)
        for n in gl.static_range(0, TILE - 128, 128):
            a = warpgroup_mma_wait(1, (a,))
            _write(a, w_N, k_scale, out, first, key + n, S, T, H)
            a = warpgroup_mma(tile.slice(n + 128, 64, 0), q, zero, use_acc=False, is_async=True)
            b = warpgroup_mma_wait(1, (b,))
            _write(b, w_N, k_scale, out, first, key + n + 64, S, T, H)
            b = warpgroup_mma(tile.slice(n + 192, 64, 0), q, zero, use_acc=False, is_async=True)
        a = warpgroup_mma_wait(1, (a,))
        _write(a, w_N, k_scale, out, first, key + (TILE - 128), S, T, H)
        b = warpgroup_mma_wait(0, (b,))
        barrier()  # all warps have multiplied the tile: its place is free
        _fetch(keys, tile, arrived, key + STAGES * TILE, i + STAGES < tiles)
        _write(b, w_N, k_scale, out, first, key + (TILE - 64), S, T, H)


def index_scores(
    q_SHD: Tensor, k_TD: Tensor, w_SH: Tensor, starts_S: Tensor, ends_S: Tensor, k_scale_T: Tensor | None
) -> Tensor:
    (S, H, D), T = q_SHD.shape, k_TD.shape[0]
    scores_ST = torch.empty(S, T, dtype=torch.float32, device=q_SHD.device)
    if S == 0 or T == 0:
        return scores_ST
    scale = torch.ones(T, device=k_TD.device) if k_scale_T is None else k_scale_T.float().contiguous()
    queries = TensorDescriptor.from_tensor(aligned(q_SHD).view(S * H, D), [ROWS, D], SWIZZLED.value)
    keys = TensorDescriptor.from_tensor(aligned(k_TD), [TILE.value, D], SWIZZLED.value)
    grid, chunk = chunks(S, T, ROWS // H, TILE.value, least=1)
    scores_kernel[grid](
        queries, keys, w_SH.contiguous(), scale, *ranges(starts_S, ends_S), scores_ST, S, T, chunk, H=H, num_warps=8
    )
    return scores_ST


def index_topk(
    q_SHD: Tensor, k_TD: Tensor, w_SH: Tensor, k: int, starts_S: Tensor, ends_S: Tensor, k_scale_T: Tensor | None
) -> Tensor:
    return topk.index_topk(q_SHD, k_TD, w_SH, k, starts_S, ends_S, k_scale_T, scores_of=index_scores)
