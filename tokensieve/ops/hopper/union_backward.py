"""The backward of a wide block of queries that share a union of selected entries, for few heads to a group.

Legend: S queries, T key tokens, H heads, G key-value groups, M heads of a group (MP padded), D key width, V value
width. A program holds the 128 rows of a block's B queries and one group's heads, and walks over its union 64 keys at
a time.

    P = exp(scale q . k - lse),   dS = P (dout . v - delta),   dq = scale dS k,   delta = dout . out - dlse
    dk[s] += scale dS[:, s]^T q,   dv[s] += P[:, s]^T dout

Four groups of four warps. Two compute, each P, dS and dq of its half of the rows; then one sums dv over all rows, the
other dk. One group loads the entries two tiles ahead, and one adds the sums of the tile before to memory, atomically.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tokensieve.ops.hopper.union_rows import entries, load_keys, load_union, row_of, seen
from tokensieve.ops.hopper.warps import LOG2E, allocate_barriers, barrier, columns, load_block, release

TILE: gl.constexpr = gl.constexpr(64)  # keys


@gluon.jit
def _compute(
    q_shared, dout_shared, k_shared, v_shared, p_shared, ds_shared, staging, full, empty, pairs, staged,
    marks, lse, delta, dq_out, base, count, tiles, block, g, S, scale,
    H: gl.constexpr, G: gl.constexpr, MP: gl.constexpr, B: gl.constexpr, D: gl.constexpr, V: gl.constexpr,
    SECOND: gl.constexpr,
):  # fmt: skip
    """P, dS and dq of one half of the rows, and of all rows dv, or dk if SECOND."""
    first: gl.constexpr = 64 if SECOND else 0
    logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    W: gl.constexpr = D if SECOND else V
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W, 16])
    dtype: gl.constexpr = p_shared.dtype
    b, row, mine = row_of(block, g, first, S, H, G, MP, B, logits)
    lse_R = gl.load(lse + row, mask=mine, other=float("inf"))
    lse_R = gl.where(lse_R == float("-inf"), float("inf"), lse_R) * LOG2E  # no key: probability 0
    delta_R = gl.load(delta + row, mask=mine, other=0.0)
    dq = gl.zeros([64, D], gl.float32, wide)
    place = columns(logits, 64)
    mark_next = gl.load(marks + base + place, mask=place < count, other=0)
    for tile in range(tiles):
        # `zero` is always 0, but the compiler does not know that: else it would keep the address of every operand in
        # registers, and spill.
        buffer, parity, once, zero = tile & 1, (tile >> 1) & 1, tile & 1, tile >> 30
        q_all, dout_all = q_shared.index(zero), dout_shared.index(zero)
        p_all, ds_all = p_shared.index(zero), ds_shared.index(zero)
        k_now, v_now = k_shared.index(buffer), v_shared.index(buffer)
        mark = mark_next
        ahead = (tile + 1) * TILE + place
        mark_next = gl.load(marks + base + ahead, mask=ahead < count, other=0)
        mbarrier.wait(full.index(buffer), parity)
        x = warpgroup_mma(
            q_all.slice(first, 64, 0), k_now.permute((1, 0)), gl.zeros([64, 64], gl.float32, logits),
            use_acc=False, is_async=True,
        )  # fmt: skip
        mbarrier.wait(full.index(2 + buffer), parity)
        dp = warpgroup_mma(
            dout_all.slice(first, 64, 0), v_now.permute((1, 0)), gl.zeros([64, 64], gl.float32, logits),
            use_acc=False, is_async=True,
        )  # fmt: skip
        x = warpgroup_mma_wait(1, (x,))
        selected = seen(mark, b)
        p = gl.where(selected, gl.exp2(x * (scale * LOG2E) - lse_R[:, None]), 0.0)
        mbarrier.wait(pairs.index(1), once ^ 1)
        p_all.slice(first, 64, 0).store(p.to(dtype))
        dp = warpgroup_mma_wait(0, (dp,))
        release(empty.index(2 + buffer))
        ds = gl.where(selected, p * (dp - delta_R[:, None]), 0.0)
        ds_all.slice(first, 64, 0).store(ds.to(dtype))
        fence_async_shared()
        release(pairs.index(0))
        dq = warpgroup_mma(ds_all.slice(first, 64, 0), k_now, dq, is_async=True)
        mbarrier.wait(pairs.index(0), once)
        if SECOND:
            sum = warpgroup_mma(
                ds_all.permute((1, 0)), q_all, gl.zeros([64, W], gl.float32, sums), use_acc=False, is_async=True
            )
        else:
            sum = warpgroup_mma(
                p_all.permute((1, 0)), dout_all, gl.zeros([64, W], gl.float32, sums), use_acc=False, is_async=True
            )
        dq = warpgroup_mma_wait(1, (dq,))
        release(empty.index(buffer))
        sum = warpgroup_mma_wait(0, (sum,))
        release(pairs.index(1))
        mbarrier.wait(staged.index(1), once ^ 1)
        staging.store(sum * scale if SECOND else sum)
        release(staged.index(0))
    _b, row, mine = row_of(block, g, first, S, H, G, MP, B, wide)
    at = row[:, None] * D + columns(wide, D)[None, :]
    gl.store(dq_out + at, (dq * scale).to(dq_out.dtype.element_ty), mask=mine[:, None])


@gluon.jit
def _add_part(dkv, key, g, staging, part: gl.constexpr, G: gl.constexpr, E: gl.constexpr, W: gl.constexpr,
              lines: gl.constexpr):  # fmt: skip
    """Adds 16 rows of W sums in whole lines."""
    at = entries(key, g, G, E)[:, None] + columns(lines, W)[None, :]
    value = staging.slice(part * 16, 16, 0).load(lines)
    gl.atomic_add(dkv + at, value, mask=(key >= 0)[:, None], sem="relaxed")


@gluon.jit
def _as(key, lines: gl.constexpr):
    return gl.convert_layout(key, gl.SliceLayout(1, lines))


@gluon.jit
def _add(
    dkv, keys, base, count, tiles, g, dv_staging, dk_staging, dv_staged, dk_staged,
    G: gl.constexpr, E: gl.constexpr, D: gl.constexpr, V: gl.constexpr, v_start: gl.constexpr,
):  # fmt: skip
    v_lines: gl.constexpr = gl.BlockedLayout([1, 4], [128 // V, V // 4], [4, 1], [1, 0])
    k_lines: gl.constexpr = gl.BlockedLayout([1, 4], [128 // D, D // 4], [4, 1], [1, 0])
    for tile in range(tiles):
        key0 = load_keys(keys, base, tile * TILE, count, 16, v_lines)
        key1 = load_keys(keys, base, tile * TILE + 16, count, 16, v_lines)
        key2 = load_keys(keys, base, tile * TILE + 32, count, 16, v_lines)
        key3 = load_keys(keys, base, tile * TILE + 48, count, 16, v_lines)
        mbarrier.wait(dv_staged.index(0), tile & 1)
        _add_part(dkv + v_start, key0, g, dv_staging, 0, G, E, V, v_lines)
        _add_part(dkv + v_start, key1, g, dv_staging, 1, G, E, V, v_lines)
        _add_part(dkv + v_start, key2, g, dv_staging, 2, G, E, V, v_lines)
        _add_part(dkv + v_start, key3, g, dv_staging, 3, G, E, V, v_lines)
        release(dv_staged.index(1))
        key0, key1 = _as(key0, k_lines), _as(key1, k_lines)
        key2, key3 = _as(key2, k_lines), _as(key3, k_lines)
        mbarrier.wait(dk_staged.index(0), tile & 1)
        _add_part(dkv, key0, g, dk_staging, 0, G, E, D, k_lines)
        _add_part(dkv, key1, g, dk_staging, 1, G, E, D, k_lines)
        _add_part(dkv, key2, g, dk_staging, 2, G, E, D, k_lines)
        _add_part(dkv, key3, g, dk_staging, 3, G, E, D, k_lines)
        release(dk_staged.index(1))


@gluon.jit(do_not_specialize=["S", "C"])
def union_backward_kernel(
    dout, q, kv, lse, delta, dq, dkv, keys, marks, counts, S, C, scale,
    H: gl.constexpr, G: gl.constexpr, E: gl.constexpr, MP: gl.constexpr, B: gl.constexpr, D: gl.constexpr,
    V: gl.constexpr, v_start: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = kv.dtype.element_ty
    block, g = gl.program_id(0) // G, gl.program_id(0) % G
    count = gl.load(counts + block)
    if count < 0:  # another kernel takes the block
        return
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    q_shared = gl.allocate_shared_memory(dtype, [1, 128, D], shared)
    dout_shared = gl.allocate_shared_memory(dtype, [1, 128, V], shared)
    k_shared = gl.allocate_shared_memory(dtype, [2, 64, D], shared)
    v_shared = gl.allocate_shared_memory(dtype, [2, 64, V], shared)
    p_shared = gl.allocate_shared_memory(dtype, [1, 128, 64], shared)
    ds_shared = gl.allocate_shared_memory(dtype, [1, 128, 64], shared)
    dv_staging = gl.allocate_shared_memory(gl.float32, [64, V], flat)
    dk_staging = gl.allocate_shared_memory(gl.float32, [64, D], flat)
    full, empty = allocate_barriers(4, 128), allocate_barriers(4, 2)  # of keys, then of values, two buffers each
    pairs = allocate_barriers(2, 2)
    dv_staged, dk_staged = allocate_barriers(2, 1), allocate_barriers(2, 1)

    q_lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    v_lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // V, V // 8], [4, 1], [1, 0])
    for half in gl.static_range(2):
        _b, row, mine = row_of(block, g, half * 64, S, H, G, MP, B, q_lines)
        load_block(q, row * D, mine, 0, D, q_shared.index(0).slice(half * 64, 64, 0), q_lines)
        _b, row, mine = row_of(block, g, half * 64, S, H, G, MP, B, v_lines)
        load_block(dout, row * V, mine, 0, V, dout_shared.index(0).slice(half * 64, 64, 0), v_lines)
    fence_async_shared()
    barrier()
    base, tiles = block.to(gl.int64) * C, gl.cdiv(count, TILE)
    gl.warp_specialize(
        [
            (_compute, (
                q_shared, dout_shared, k_shared, v_shared, p_shared, ds_shared, dv_staging, full, empty, pairs,
                dv_staged, marks, lse, delta, dq, base, count, tiles, block, g, S, scale, H, G, MP, B, D, V, False,
            )),
            (_compute, (
                q_shared, dout_shared, k_shared, v_shared, p_shared, ds_shared, dk_staging, full, empty, pairs,
                dk_staged, marks, lse, delta, dq, base, count, tiles, block, g, S, scale, H, G, MP, B, D, V, True,
            )),
            (load_union, (
                kv, keys, base, count, tiles, g, k_shared, v_shared, full, empty, G, E, D, V, v_start, TILE, 2
            )),
            (_add, (
                dkv, keys, base, count, tiles, g, dv_staging, dk_staging, dv_staged, dk_staged, G, E, D, V, v_start
            )),
        ],
        [4, 4, 4],
        [200, 48, 64],
    )  # fmt: skip
