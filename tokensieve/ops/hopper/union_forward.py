"""Attention of a wide block of queries over the union of what they selected, for few heads to a group.

Legend: S queries, T key tokens, H heads, G key-value groups, M heads of a group (MP padded), D key width, V value
width, N keys of a step. A program holds the 128 rows of a block's B queries and one group's heads, and walks over its
union.

Three groups of four warps. One loads the entries. Two compute, each half of the rows: while the products of a step run,
the softmax of the other half does.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tokensieve.ops.hopper.union_rows import load_union, row_of, seen
from tokensieve.ops.hopper.warps import (
    LN2,
    allocate_barriers,
    barrier,
    columns,
    load_block,
    release,
    softmax_step,
)


@gluon.jit
def _logits(q_half, k_shared, full, step, N: gl.constexpr, BUFFERS: gl.constexpr, layout: gl.constexpr):
    buffer = step % BUFFERS
    mbarrier.wait(full.index(buffer), (step // BUFFERS) & 1)
    zero = gl.zeros([64, N], gl.float32, layout)
    return warpgroup_mma(q_half, k_shared.index(buffer).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _attend(
    q_shared, k_shared, v_shared, p_shared, full, empty, marks, out, lse, broken, base, count, steps, block, g, S,
    scale, H: gl.constexpr, G: gl.constexpr, MP: gl.constexpr, B: gl.constexpr, V: gl.constexpr, N: gl.constexpr,
    BUFFERS: gl.constexpr, SECOND: gl.constexpr,
):  # fmt: skip
    first: gl.constexpr = 64 if SECOND else 0
    logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    dtype: gl.constexpr = p_shared.dtype
    b, row, mine = row_of(block, g, first, S, H, G, MP, B, logits)
    q_half, p_half = q_shared.slice(first, 64, 0), p_shared.slice(first, 64, 0)
    place = columns(logits, N)
    mark = gl.load(marks + base + place, mask=place < count, other=0)
    x = _logits(q_half, k_shared, full, 0, N, BUFFERS, logits)
    mark_next = gl.load(marks + base + N + place, mask=N + place < count, other=0)
    x = warpgroup_mma_wait(0, (x,))
    release(empty.index(0))
    largest = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, logits))
    p, _, largest = softmax_step(x, seen(mark, b), scale, largest)
    total = gl.sum(p, 1)
    p_half.store(p.to(dtype))
    acc = gl.zeros([64, V], gl.float32, values)
    for step in range(1, steps):
        before = (step - 1) % BUFFERS
        mark = mark_next
        ahead = (step + 1) * N + place
        mark_next = gl.load(marks + base + ahead, mask=ahead < count, other=0)
        fence_async_shared()
        barrier()
        mbarrier.wait(full.index(BUFFERS + before), ((step - 1) // BUFFERS) & 1)
        acc = warpgroup_mma(p_half, v_shared.index(before), acc, is_async=True)
        x = _logits(q_half, k_shared, full, step, N, BUFFERS, logits)
        acc = warpgroup_mma_wait(1, (acc,))
        release(empty.index(BUFFERS + before))
        x = warpgroup_mma_wait(0, (x,))
        release(empty.index(step % BUFFERS))
        p, shrink, largest = softmax_step(x, seen(mark, b), scale, largest)
        total = total * shrink + gl.sum(p, 1)
        p_half.store(p.to(dtype))
        acc *= gl.convert_layout(shrink, gl.SliceLayout(1, values))[:, None]
    last = (steps - 1) % BUFFERS
    fence_async_shared()
    barrier()
    mbarrier.wait(full.index(BUFFERS + last), ((steps - 1) // BUFFERS) & 1)
    acc = warpgroup_mma(p_half, v_shared.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, (acc,))
    divisor = gl.where(total == 0, 1.0, total)  # a query without keys divides by 1; NaN stays
    gl.store(lse + row, gl.where(total == 0, float("-inf"), (largest + gl.log2(divisor)) * LN2), mask=mine)
    acc *= (1 / gl.convert_layout(divisor, gl.SliceLayout(1, values)))[:, None]
    _b, row, mine = row_of(block, g, first, S, H, G, MP, B, values)
    gl.store(out + row[:, None] * V + columns(values, V)[None, :], acc.to(out.dtype.element_ty), mask=mine[:, None])
    size = gl.max(gl.where(mine, gl.max(gl.where(acc == acc, gl.abs(acc), float("inf")), 1), 0.0), 0)
    if size == float("inf"):
        gl.store(broken + block, 1)


@gluon.jit(do_not_specialize=["S", "C"])
def union_forward_kernel(
    q, kv, out, lse, keys, marks, counts, broken, S, C, scale,
    H: gl.constexpr, G: gl.constexpr, E: gl.constexpr, MP: gl.constexpr, B: gl.constexpr, D: gl.constexpr,
    V: gl.constexpr, v_start: gl.constexpr, N: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = kv.dtype.element_ty
    block, g = gl.program_id(0) // G, gl.program_id(0) % G
    count = gl.load(counts + block)
    if count < 0:  # another kernel takes the block
        return
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_shared = gl.allocate_shared_memory(dtype, [128, D], shared)
    k_shared = gl.allocate_shared_memory(dtype, [BUFFERS, N, D], shared)
    v_shared = gl.allocate_shared_memory(dtype, [BUFFERS, N, V], shared)
    p_shared = gl.allocate_shared_memory(dtype, [128, N], shared)
    full, empty = allocate_barriers(2 * BUFFERS, 128), allocate_barriers(2 * BUFFERS, 2)  # of keys, then of values
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    for half in gl.static_range(2):
        _b, row, mine = row_of(block, g, half * 64, S, H, G, MP, B, lines)
        load_block(q, row * D, mine, 0, D, q_shared.slice(half * 64, 64, 0), lines)
    fence_async_shared()
    barrier()
    base, steps = block.to(gl.int64) * C, gl.maximum(gl.cdiv(count, N), 1)
    gl.warp_specialize(
        [
            (_attend, (
                q_shared, k_shared, v_shared, p_shared, full, empty, marks, out, lse, broken, base, count, steps, block,
                g, S, scale, H, G, MP, B, V, N, BUFFERS, False,
            )),
            (_attend, (
                q_shared, k_shared, v_shared, p_shared, full, empty, marks, out, lse, broken, base, count, steps, block,
                g, S, scale, H, G, MP, B, V, N, BUFFERS, True,
            )),
            (load_union, (
                kv, keys, base, count, steps, g, k_shared, v_shared, full, empty, G, E, D, V, v_start, N, BUFFERS
            )),
        ],
        [4, 4],
        [224, 64],
    )  # fmt: skip
