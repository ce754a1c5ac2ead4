"""Rows and entries of the kernels over unions, which both share.

Legend: S queries, H heads, G key-value groups, M heads of a group (MP padded), B queries of a block, E width of a
group's entry. A program holds 128 rows, B * MP of a block's queries and one group's heads, and computes them in halves
of 64.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tokensieve.ops.hopper.warps import copy_columns, rows


@gluon.jit
def row_of(block, g, first: gl.constexpr, S, H: gl.constexpr, G: gl.constexpr, MP: gl.constexpr, B: gl.constexpr,
           layout: gl.constexpr):  # fmt: skip
    """64 rows: the query within the block, the place among all queries' heads, and whether it is one."""
    r = first + rows(layout, 64)
    M: gl.constexpr = H // G
    b, m = r // MP, r % MP
    t = block * B + b
    return b, t.to(gl.int64) * H + g * M + m, (b < B) & (m < M) & (t < S)


@gluon.jit
def seen(mark, b):
    """(rows, places): whether the row's query, `b` of the block, selected the place's key."""
    return ((mark[None, :] >> b[:, None]) & 1) != 0


@gluon.jit
def load_keys(keys, base, begin, count, N: gl.constexpr, layout: gl.constexpr):
    """N keys of a block's list (int32), -1 past its end."""
    n = begin + rows(layout, N)
    return gl.load(keys + base + n, mask=n < count, other=-1)


@gluon.jit
def entries(key, g, G: gl.constexpr, E: gl.constexpr):
    """Beginnings of one group's entries; the first one's if there is no key."""
    return (gl.where(key >= 0, key, 0).to(gl.int64) * G + g) * E


@gluon.jit
def load_union(
    kv, keys, base, count, steps, g, k_shared, v_shared, full, empty,
    G: gl.constexpr, E: gl.constexpr, D: gl.constexpr, V: gl.constexpr, v_start: gl.constexpr, N: gl.constexpr,
    BUFFERS: gl.constexpr,
):  # fmt: skip
    """Loads N keys of a block's list and their values a step, BUFFERS steps ahead. Barriers: of keys, then values."""
    k_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    v_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // V, V // 8], [4, 1], [1, 0])
    k_key = load_keys(keys, base, 0, count, N, k_layout)
    v_key = load_keys(keys, base, 0, count, N, v_layout)
    for step in range(steps):
        buffer, parity = step % BUFFERS, ((step // BUFFERS) & 1) ^ 1
        k_now, v_now = k_key, v_key
        k_key = load_keys(keys, base, (step + 1) * N, count, N, k_layout)
        v_key = load_keys(keys, base, (step + 1) * N, count, N, v_layout)
        # Addresses are made before each wait, and so while one waits.
        row, live, k_buffer = entries(k_now, g, G, E), k_now >= 0, k_shared.index(buffer)
        free, there = empty.index(buffer), full.index(buffer)
        mbarrier.wait(free, parity)
        copy_columns(kv, row, live, 0, D, k_buffer, there, k_layout)
        row, live, v_buffer = entries(v_now, g, G, E), v_now >= 0, v_shared.index(buffer)
        free, there = empty.index(BUFFERS + buffer), full.index(BUFFERS + buffer)
        mbarrier.wait(free, parity)
        copy_columns(kv + v_start, row, live, 0, V, v_buffer, there, v_layout)
