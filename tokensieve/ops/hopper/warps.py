"""What the Hopper kernels share: an entry's shape, the loading of entries by separate warps, products with their parts.

A tile is 64 selected entries: `main`, their 512 value columns, and `tail`, the 64 that are key only, both in shared
memory in the tensor cores' layout. It is loaded and released in parts of 128 columns. Every part has two barriers:
`full` (its bytes have arrived) and `empty` (nothing reads it any more). One waits on them by the parity of how often
the part has been used.
"""

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

LOG2E: gl.constexpr = gl.constexpr(math.log2(math.e))
LN2: gl.constexpr = gl.constexpr(math.log(2))
KEY, VALUE = 576, 512  # widths of an entry's key and of the key's first part, which is the value
HEAD_BLOCK, TILE = 64, 64  # heads of a program, and entries of a tile
PARTS: gl.constexpr = gl.constexpr(5)  # four of `main`, and the tail

# Gluon renames things: the first name is Triton 3.9's, the second that of 3.6 and 3.7.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
copy_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
VIEWS: gl.constexpr = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # or the older name, with a _


@gluon.jit
def rows(layout: gl.constexpr, N: gl.constexpr):
    return gl.arange(0, N, gl.SliceLayout(1, layout))


@gluon.jit
def columns(layout: gl.constexpr, N: gl.constexpr):
    return gl.arange(0, N, gl.SliceLayout(0, layout))


@gluon.jit
def query_and_head(H):
    """This program's query and first head. The grid has one axis: its other axes end at 65535 programs."""
    blocks = gl.cdiv(H, 64)
    return (gl.program_id(0) // blocks).to(gl.int64), gl.program_id(0) % blocks * 64


@gluon.jit
def used_tiles(indices, K, KP: gl.constexpr, WARPS: gl.constexpr):
    """How many tiles of 64 places there are up to the last place that names a key."""
    at = gl.arange(0, KP, gl.BlockedLayout([8], [32], [WARPS], [0]))
    index = gl.load(indices + at, mask=at < K, other=-1)
    return gl.cdiv(gl.max(gl.where(index >= 0, at + 1, 0), 0), 64)


@gluon.jit
def allocate_barriers(
    N: gl.constexpr, COUNT: gl.constexpr, SPECIAL: gl.constexpr = -1, SPECIAL_COUNT: gl.constexpr = 0
):
    """N barriers, each completed by COUNT arrivals, the one at SPECIAL by SPECIAL_COUNT."""
    barriers = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(barriers.index(i), count=SPECIAL_COUNT if i == SPECIAL else COUNT)
    return barriers


@gluon.jit
def load_block(x, row, mine, begin: gl.constexpr, W: gl.constexpr, buffer, layout: gl.constexpr):
    """Columns begin to begin + W of the rows that start at `row`, into shared memory; zeros if not `mine`."""
    at = row[:, None] + (begin + columns(layout, W))[None, :]
    buffer.store(gl.load(x + at, mask=mine[:, None], other=0.0))


@gluon.jit
def load_query(q, first_row, heads, main, tail, layout: gl.constexpr):
    """The rows of up to 64 heads of a query, for products that follow."""
    row, mine = (first_row + rows(layout, 64)) * 576, rows(layout, 64) < heads
    for part in gl.static_range(4):
        load_block(q, row, mine, 128 * part, 128, main.slice(128 * part, 128, 1), layout)
    load_block(q, row, mine, 512, 64, tail, layout)
    fence_async_shared()
    barrier()


@gluon.jit
def store_block(x, row, mine, begin: gl.constexpr, W: gl.constexpr, value, buffer, layout: gl.constexpr):
    """The way back, from registers; through `buffer`, so that a warp writes whole lines."""
    buffer.store(value.to(buffer.dtype))
    barrier()
    at = row[:, None] + (begin + columns(layout, W))[None, :]
    gl.store(x + at, buffer.load(layout), mask=mine[:, None])


@gluon.jit
def load_tile_index(indices, tile, T, K, layout: gl.constexpr):
    """The keys that the places of a tile name, -1 for none of the T keys."""
    at = tile * 64 + rows(layout, 64)
    index = gl.load(indices + at, mask=at < K, other=-1)
    return gl.where(index < T, index, -1)


@gluon.jit
def live_columns(indices, tile, T, K, layout: gl.constexpr):
    """Which places of a tile name a key, as a mask over the columns of the logits."""
    at = tile * 64 + columns(layout, 64)
    index = gl.load(indices + at, mask=at < K, other=-1)
    return ((index >= 0) & (index < T))[None, :]


@gluon.jit
def load_marks(marks, tile, K, layout: gl.constexpr):
    """Marks of the places of a tile, for the columns of the logits; 0 past the end."""
    at = tile * 64 + columns(layout, 64)
    return gl.load(marks + at, mask=at < K, other=0)


@gluon.jit
def seen_pairs(mark, first_head, M: gl.constexpr, layout: gl.constexpr):
    """A mask of the places that each of the 64 rows from `first_head` on attends to, of M heads a query."""
    return ((mark[None, :] >> ((first_head + rows(layout, 64)) // M)[:, None]) & 1) != 0


@gluon.jit
def breaks_of(mark):
    """0, or NaN where a place's key is broken: added to logits, it makes them NaN."""
    return gl.where(mark < 0, float("nan"), 0.0)[None, :]


@gluon.jit
def copy_columns(x, row, live, begin: gl.constexpr, W: gl.constexpr, buffer, full, layout: gl.constexpr):
    """Starts the copy of columns begin to begin + W of the rows that start at `row`; zeros if not `live`."""
    copy_async(buffer, x + (row[:, None] + (begin + columns(layout, W))[None, :]), mask=live[:, None])
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def load_part(kv, index, begin: gl.constexpr, W: gl.constexpr, buffer, empty, full, parity, layout: gl.constexpr):
    """Starts the copy of W columns of the entries that `index` names, once `buffer` is free; zeros if it names none."""
    mbarrier.wait(empty, parity)
    live = index >= 0
    row = gl.where(live, index, 0).to(gl.int64) * 576
    copy_columns(kv, row, live, begin, W, buffer, full, layout)


@gluon.jit
def release(x):
    """Signals that all warps of this group are past this line."""
    barrier()
    mbarrier.arrive(x, count=1)


@gluon.jit
def multiply_part(x, main, begin: gl.constexpr, sum, full, parity):
    """Starts sum += x . k over 128 columns of a tile's entries, once they are there."""
    mbarrier.wait(full, parity)
    return warpgroup_mma(x.slice(begin, 128, 1), main.slice(begin, 128, 1).permute((1, 0)), sum, is_async=True)


@gluon.jit
def softmax_step(logit, live, scale, largest):
    """Online softmax to base 2.

    Returns probabilities over exp2(largest logit so far), the factor by which earlier sums shrink, and that logit.
    """
    logit = gl.where(live, logit * (scale * LOG2E), float("-inf"))
    now = gl.maximum(largest, gl.max(logit, 1))
    base = gl.where(now == float("-inf"), 0.0, now)  # before the first key: -inf minus -inf would be NaN
    return gl.exp2(logit - base[:, None]), gl.exp2(largest - base), now
