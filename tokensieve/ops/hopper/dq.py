"""The first half of backward: dq of one query and 64 heads, and what dkv is made of, the probabilities and the slopes
of the logits.

Legend: S queries, T key tokens, H heads, K selected.

    P = exp(scale q . k - lse),   dS = scale P (dout . v - delta),   dq = dS k,   delta = dout . out - dlse

Three groups of four warps: one loads, one computes q . k, one dout . v. The second hands its probabilities to the
third, which makes the slopes. Then each of the two multiplies them with its half of the entries' columns. P and dS are
stored in the dtype in which they are multiplied, so that the second half (`dkv`) recomputes nothing.
"""

from torch import Tensor
from triton import cdiv
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tokensieve.ops.hopper.forward import Folded
from tokensieve.ops.hopper.warps import (
    HEAD_BLOCK,
    LOG2E,
    PARTS,
    allocate_barriers,
    barrier,
    columns,
    live_columns,
    load_block,
    load_marks,
    load_part,
    load_tile_index,
    multiply_part,
    query_and_head,
    release,
    rows,
    seen_pairs,
    store_block,
    used_tiles,
)
from tokensieve.ops.triton.index import padded


@gluon.jit
def _load(kv, indices, T, K, tiles, mains, tails, full, empty):
    """Loads parts in the order in which they become free.

    The two groups release the first halves of their columns at the same time.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    index = load_tile_index(indices, 0, T, K, layout)
    main, tail = mains.index(0), tails.index(0)
    for tile in range(tiles):
        now = index
        index = load_tile_index(indices, tile + 1, T, K, layout)
        parity = (tile & 1) ^ 1
        load_part(kv, now, 0, 128, main.slice(0, 128, 1), empty.index(0), full.index(0), parity, layout)
        load_part(kv, now, 256, 128, main.slice(256, 128, 1), empty.index(1), full.index(1), parity, layout)
        load_part(kv, now, 128, 128, main.slice(128, 128, 1), empty.index(2), full.index(2), parity, layout)
        load_part(kv, now, 512, 64, tail, empty.index(3), full.index(3), parity, layout)
        load_part(kv, now, 384, 128, main.slice(384, 128, 1), empty.index(4), full.index(4), parity, layout)


@gluon.jit
def _probabilities(
    q_mains, q_tails, mains, tails, p_shared, ds_shared, full, empty, p_ready, ds_ready,
    indices, marks, lse, dq, p_out, first_row, first_head, heads, T, K, pitch, tiles, scale, M: gl.constexpr,
):  # fmt: skip
    """Computes P, and columns 0 to 255 and 512 to 543 of dq."""
    logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    lse_H = gl.load(lse + first_row + rows(logits, 64), mask=rows(logits, 64) < heads, other=float("inf"))
    lse_H = gl.where(lse_H == float("-inf"), float("inf"), lse_H) * LOG2E  # no key: probability 0
    head, mine = rows(lines, 64), rows(lines, 64) < heads
    p_out += first_row * pitch
    pair = (head * pitch)[:, None] + columns(lines, 64)[None, :]
    dq0 = gl.zeros([64, 128], gl.float32, wide)
    dq1 = gl.zeros([64, 128], gl.float32, wide)
    dq2 = gl.zeros([64, 32], gl.float32, narrow)
    if M > 0:
        mark_next = load_marks(marks, 0, K, logits)
    for tile in range(tiles):
        # `zero` is always 0, but the compiler does not know that: else it would keep the address of every operand in
        # registers, and spill.
        parity, zero = tile & 1, tile >> 30
        q_main, q_tail, main, tail = q_mains.index(zero), q_tails.index(zero), mains.index(zero), tails.index(zero)
        if M > 0:
            live = seen_pairs(mark_next, first_head, M, logits)
            mark_next = load_marks(marks, tile + 1, K, logits)
        else:
            live = live_columns(indices, tile, T, K, logits)
        x = gl.zeros([64, 64], gl.float32, logits)
        x = multiply_part(q_main, main, 0, x, full.index(0), parity)
        x = multiply_part(q_main, main, 256, x, full.index(1), parity)
        x = multiply_part(q_main, main, 128, x, full.index(2), parity)
        mbarrier.wait(full.index(3), parity)
        x = warpgroup_mma(q_tail, tail.permute((1, 0)), x, is_async=True)
        x = multiply_part(q_main, main, 384, x, full.index(4), parity)
        x = warpgroup_mma_wait(0, (x,))
        p = gl.where(live, gl.exp2(x * (scale * LOG2E) - lse_H[:, None]), 0.0)
        p_shared.store(p.to(p_shared.dtype))
        release(p_ready)
        mbarrier.wait(ds_ready, parity)
        dq0 = warpgroup_mma(ds_shared, main.slice(0, 128, 1), dq0, is_async=True)
        dq1 = warpgroup_mma(ds_shared, main.slice(128, 128, 1), dq1, is_async=True)
        dq2 = warpgroup_mma(ds_shared, tail.slice(0, 32, 1), dq2, is_async=True)
        gl.store(p_out + pair, p_shared.load(lines), mask=mine[:, None])
        p_out += 64
        dq0 = warpgroup_mma_wait(2, (dq0,))
        release(empty.index(0))
        dq1, dq2 = warpgroup_mma_wait(0, (dq1, dq2))
        release(empty.index(2))
        mbarrier.arrive(empty.index(3), count=1)
    row = (first_row + head) * 576
    store_block(dq, row, mine, 0, 128, dq0, q_mains.index(0).slice(0, 128, 1), lines)
    store_block(dq, row, mine, 128, 128, dq1, q_mains.index(0).slice(128, 128, 1), lines)
    store_block(dq, row, mine, 512, 32, dq2, q_tails.index(0).slice(0, 32, 1), lines)


@gluon.jit
def _slopes(
    douts, mains, tails, p_shared, ds_shared, full, empty, p_ready, ds_ready,
    delta, dq, ds_out, first_row, heads, pitch, tiles, scale, M: gl.constexpr,
):  # fmt: skip
    """Computes dS, and columns 256 to 511 and 544 to 575 of dq."""
    logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    delta_H = gl.load(delta + first_row + rows(logits, 64), mask=rows(logits, 64) < heads, other=0.0)
    head, mine = rows(lines, 64), rows(lines, 64) < heads
    ds_out += first_row * pitch
    pair = (head * pitch)[:, None] + columns(lines, 64)[None, :]
    dq0 = gl.zeros([64, 128], gl.float32, wide)
    dq1 = gl.zeros([64, 128], gl.float32, wide)
    dq2 = gl.zeros([64, 32], gl.float32, narrow)
    for tile in range(tiles):
        parity, zero = tile & 1, tile >> 30
        dout, main, tail = douts.index(zero), mains.index(zero), tails.index(zero)
        x = gl.zeros([64, 64], gl.float32, logits)
        x = multiply_part(dout, main, 0, x, full.index(0), parity)
        x = multiply_part(dout, main, 256, x, full.index(1), parity)
        x = multiply_part(dout, main, 128, x, full.index(2), parity)
        x = multiply_part(dout, main, 384, x, full.index(4), parity)
        x = warpgroup_mma_wait(0, (x,))
        mbarrier.wait(p_ready, parity)
        p = p_shared.load(logits).to(gl.float32)
        ds = p * (x - delta_H[:, None]) * scale
        if M > 0:  # a broken delta must not reach what its query did not select
            ds = gl.where(p == 0, 0.0, ds)
        ds_shared.store(ds.to(ds_shared.dtype))
        fence_async_shared()
        release(ds_ready)
        dq0 = warpgroup_mma(ds_shared, main.slice(256, 128, 1), dq0, is_async=True)
        dq1 = warpgroup_mma(ds_shared, main.slice(384, 128, 1), dq1, is_async=True)
        dq2 = warpgroup_mma(ds_shared, tail.slice(32, 32, 1), dq2, is_async=True)
        gl.store(ds_out + pair, ds_shared.load(lines), mask=mine[:, None])
        ds_out += 64
        dq0 = warpgroup_mma_wait(2, (dq0,))
        release(empty.index(1))
        dq1, dq2 = warpgroup_mma_wait(0, (dq1, dq2))
        release(empty.index(4))
        mbarrier.arrive(empty.index(3), count=1)
    row = (first_row + head) * 576
    store_block(dq, row, mine, 256, 128, dq0, douts.index(0).slice(0, 128, 1), lines)
    store_block(dq, row, mine, 384, 128, dq1, douts.index(0).slice(128, 128, 1), lines)
    store_block(dq, row, mine, 544, 32, dq2, douts.index(0).slice(256, 32, 1), lines)


@gluon.jit(do_not_specialize=["T"])
def dq_kernel(
    dout, q, kv, indices, marks, lse, delta, dq, p_out, ds_out, H, T, K, pitch, scale,
    KP: gl.constexpr, M: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = kv.dtype.element_ty
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    t, first_head = query_and_head(H)
    first_row, heads = t * H + first_head, gl.minimum(H - first_head, 64)
    q_mains = gl.allocate_shared_memory(dtype, [1, 64, 512], shared)
    q_tails = gl.allocate_shared_memory(dtype, [1, 64, 64], shared)
    douts = gl.allocate_shared_memory(dtype, [1, 64, 512], shared)
    mains = gl.allocate_shared_memory(dtype, [1, 64, 512], shared)
    tails = gl.allocate_shared_memory(dtype, [1, 64, 64], shared)
    p_shared = gl.allocate_shared_memory(dtype, [64, 64], shared)
    ds_shared = gl.allocate_shared_memory(dtype, [64, 64], shared)
    full, ready = allocate_barriers(PARTS, 128), allocate_barriers(2, 1)
    empty = allocate_barriers(PARTS, 1, 3, 2)  # both groups read the tail

    indices += t * K
    if M > 0:
        marks += t * K
    tiles = used_tiles(indices, K, KP, 4)
    row, mine = first_row + rows(lines, 64), rows(lines, 64) < heads
    for part in gl.static_range(4):
        load_block(q, row * 576, mine, 128 * part, 128, q_mains.index(0).slice(128 * part, 128, 1), lines)
        load_block(dout, row * 512, mine, 128 * part, 128, douts.index(0).slice(128 * part, 128, 1), lines)
    load_block(q, row * 576, mine, 512, 64, q_tails.index(0), lines)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (_probabilities, (
                q_mains, q_tails, mains, tails, p_shared, ds_shared, full, empty, ready.index(0), ready.index(1),
                indices, marks, lse, dq, p_out, first_row, first_head, heads, T, K, pitch, tiles, scale, M,
            )),
            (_slopes, (
                douts, mains, tails, p_shared, ds_shared, full, empty, ready.index(0), ready.index(1),
                delta, dq, ds_out, first_row, heads, pitch, tiles, scale, M,
            )),
            (_load, (kv, indices, T, K, tiles, mains, tails, full, empty)),
        ],
        [4, 4],
        [216, 40],
    )  # fmt: skip


def probabilities_and_dq(
    dout: Tensor, q: Tensor, kv: Tensor, indices: Tensor, lse: Tensor, delta: Tensor, scale: float,
    dq: Tensor, p: Tensor, ds: Tensor, folded: Folded | None = None,
) -> None:  # fmt: skip
    """Writes dq (S, H, 576), and P and dS (S, H, pitch) up to the end of a query's last used tile.

    If `folded` is given, a row of q is a block of queries, folded. All contiguous, S > 0.
    """
    (S, H, _), K = q.shape, indices.shape[1]
    marks, M = (indices, 0) if folded is None else (folded.marks, folded.M)
    dq_kernel[(cdiv(H, HEAD_BLOCK) * S,)](
        dout, q, kv, indices, marks, lse, delta, dq, p, ds, H, kv.shape[0], K, p.shape[2], scale,
        KP=padded(K), M=M, num_warps=4,
    )  # fmt: skip
