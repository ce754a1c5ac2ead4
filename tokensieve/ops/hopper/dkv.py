"""The second half of backward: dkv, from the probabilities P and the slopes dS that the first half (`dq`) stored.

Legend: S queries, T key tokens, H heads, K selected.

    dkv[s, :576] += dS[:, s]^T q,   dkv[s, :512] += P[:, s]^T dout

summed over heads, for every s that the query selected.

A program holds W (twice W) columns of one query's q and dout, of all heads up to 128: the product sums over them before
anything is added to memory, because atomic adds are what is expensive. While one tile's products run, the sums of the
tile before are added atomically.
"""

from torch import Tensor
from triton import cdiv
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from tokensieve.ops.hopper.warps import VALUE, barrier, columns, copy_async, load_block, rows, used_tiles
from tokensieve.ops.triton.index import padded

HEADS = 128  # of a program


@gluon.jit
def _load_pairs(x, row, tile, buffer, mine, layout: gl.constexpr):
    at = row[:, None] + (tile * 64 + columns(layout, 64))[None, :]
    copy_async(buffer, x + at, mask=mine[:, None])


@gluon.jit
def _product(ds, p, q, dout, W: gl.constexpr, WITH_VALUE: gl.constexpr, layout: gl.constexpr):
    """Starts ds^T q (+ p^T dout): 64 entries x W columns."""
    sum = warpgroup_mma(ds.permute((1, 0)), q, gl.zeros([64, W], gl.float32, layout), use_acc=False, is_async=True)
    if WITH_VALUE:
        sum = warpgroup_mma(p.permute((1, 0)), dout, sum, is_async=True)
    return sum


@gluon.jit
def _add(dkv, index, value, staging, IN_ORDER: gl.constexpr, layout: gl.constexpr):
    """Adds (64, W) to the rows that `index` names; if IN_ORDER, stores them there.

    It goes through shared memory: a warp then adds to whole lines, 1.7 times as fast as to the pieces of 32 bytes that
    it holds.
    """
    barrier()
    staging.store(value)
    barrier()
    live = (index >= 0)[:, None]
    at = gl.where(index >= 0, index, 0).to(gl.int64)[:, None] * 576 + columns(layout, value.shape[1])[None, :]
    if IN_ORDER:
        gl.store(dkv + at, staging.load(layout), mask=live)
    else:
        gl.atomic_add(dkv + at, staging.load(layout), mask=live, sem="relaxed")


@gluon.jit(do_not_specialize=["T"])
def dkv_kernel(
    p, ds, dout, q, indices, dkv, H, T, K, pitch, begin,
    KP: gl.constexpr, W: gl.constexpr, BLOCKS: gl.constexpr, TWICE: gl.constexpr, WITH_VALUE: gl.constexpr,
    IN_ORDER: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q.dtype.element_ty
    parts: gl.constexpr = 2 if TWICE else 1
    pairs: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    lines: gl.constexpr = gl.BlockedLayout([1, 4], [128 // W, W // 4], [8, 1], [1, 0])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, W // 2, 16])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    head_blocks, program = gl.cdiv(H, 128), gl.program_id(0) // BLOCKS
    t, first_head = (program // head_blocks).to(gl.int64), program % head_blocks * 128
    begin += gl.program_id(0) % BLOCKS * parts * W
    q_shared = gl.allocate_shared_memory(dtype, [parts, 128, W], shared)
    dout_shared = gl.allocate_shared_memory(dtype, [parts, 128, W] if WITH_VALUE else [1, 8, 64], shared)
    ds_shared = gl.allocate_shared_memory(dtype, [2, 128, 64], shared)
    p_shared = gl.allocate_shared_memory(dtype, [2, 128, 64] if WITH_VALUE else [2, 8, 64], shared)
    staging = gl.allocate_shared_memory(gl.float32, [64, W], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))

    indices += t * K
    tiles = used_tiles(indices, K, KP, 8)
    head = first_head + rows(pairs, 128)
    mine, row = head < H, (t * H + head) * pitch
    _load_pairs(ds, row, 0, ds_shared.index(0), mine & (tiles > 0), pairs)
    if WITH_VALUE:
        _load_pairs(p, row, 0, p_shared.index(0), mine & (tiles > 0), pairs)
    async_copy.commit_group()
    for part in gl.static_range(parts):
        load_block(q + begin, (t * H + head) * 576, mine, part * W, W, q_shared.index(part), pairs)
        if WITH_VALUE:
            load_block(dout + begin, (t * H + head) * 512, mine, part * W, W, dout_shared.index(part), pairs)
    fence_async_shared()
    dkv += begin
    place = rows(lines, 64)
    index = gl.full([64], -1, gl.int32, gl.SliceLayout(1, lines))
    ready0 = gl.zeros([64, W], gl.float32, sums)
    ready1 = gl.zeros([64, W], gl.float32, sums)
    for tile in range(tiles):
        buffer = tile & 1
        async_copy.wait_group(0)
        barrier()
        p_now, ds_now = p_shared.index(buffer), ds_shared.index(buffer)
        sum0 = _product(ds_now, p_now, q_shared.index(0), dout_shared.index(0), W, WITH_VALUE, sums)
        if TWICE:
            sum1 = _product(ds_now, p_now, q_shared.index(1), dout_shared.index(1), W, WITH_VALUE, sums)
        more = mine & (tile + 1 < tiles)
        _load_pairs(ds, row, tile + 1, ds_shared.index(1 - buffer), more, pairs)
        if WITH_VALUE:
            _load_pairs(p, row, tile + 1, p_shared.index(1 - buffer), more, pairs)
        async_copy.commit_group()
        at = tile * 64 + place
        index_now = gl.load(indices + at, mask=at < K, other=-1)
        index_now = gl.where(index_now < T, index_now, -1).to(gl.int32)
        if IN_ORDER:  # every place has its own row, one block of heads after the other
            queries = gl.num_programs(0) // BLOCKS // head_blocks
            first_row = ((program % head_blocks) * queries + program // head_blocks) * K
            index_now = gl.where(index_now >= 0, first_row + at, -1)
        _add(dkv, index, ready0, staging, IN_ORDER, lines)
        if TWICE:
            _add(dkv + W, index, ready1, staging, IN_ORDER, lines)
            ready0, ready1 = warpgroup_mma_wait(0, (sum0, sum1))
        else:
            ready0 = warpgroup_mma_wait(0, (sum0,))
        index = index_now
    async_copy.wait_group(0)
    _add(dkv, index, ready0, staging, IN_ORDER, lines)
    if TWICE:
        _add(dkv + W, index, ready1, staging, IN_ORDER, lines)


def add_dkv(
    p: Tensor, ds: Tensor, dout: Tensor, q: Tensor, indices: Tensor, dkv: Tensor, T: int, in_order: bool = False
) -> None:
    """Adds to dkv (T, 576) float32, atomically.

    If `in_order`, dkv has a row for every place of `indices` instead, (H / 128, S K, 576), and each place's share is
    stored there (nothing if it names no key). All contiguous, S > 0.
    """
    (S, H, pitch), K = p.shape, indices.shape[1]
    for begin, width, blocks, with_value in ((0, 128, VALUE // 256, True), (VALUE, 64, 1, False)):
        dkv_kernel[(blocks * cdiv(H, HEADS) * S,)](
            p, ds, dout, q, indices, dkv, H, T, K, pitch, begin,
            KP=padded(K), W=width, BLOCKS=blocks, TWICE=with_value, WITH_VALUE=with_value, IN_ORDER=in_order,
            num_warps=8,
        )  # fmt: skip
