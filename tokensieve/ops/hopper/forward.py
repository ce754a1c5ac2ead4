"""The forward kernel: out and lse of one query and 64 heads, or of a block of queries, 64 heads together (`folded`).

Legend: S queries, T key tokens, H heads, K selected; M heads of a query of a block (0: one query).

Four warps load, eight compute. The eight share a tile: each half takes 32 entries of the logits and 64 of every 128
columns of the value. While a tile's logits are computed, the products of the tile before still run, and its buffer
fills again part by part behind them. No product runs during the softmax.
"""

from dataclasses import dataclass

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

from tokensieve.ops.hopper.warps import (
    HEAD_BLOCK,
    LN2,
    PARTS,
    allocate_barriers,
    barrier,
    breaks_of,
    columns,
    live_columns,
    load_marks,
    load_part,
    load_query,
    load_tile_index,
    multiply_part,
    query_and_head,
    release,
    rows,
    seen_pairs,
    softmax_step,
    used_tiles,
)
from tokensieve.ops.triton.index import padded


@gluon.jit
def _load(kv, indices, T, K, tiles, mains, tails, full, empty):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    index = load_tile_index(indices, 0, T, K, layout)
    for tile in range(tiles):
        now = index
        index = load_tile_index(indices, tile + 1, T, K, layout)
        buffer, parity = tile & 1, ((tile >> 1) & 1) ^ 1
        main, tail, b = mains.index(buffer), tails.index(buffer), buffer * PARTS
        load_part(kv, now, 0, 128, main.slice(0, 128, 1), empty.index(b), full.index(b), parity, layout)
        load_part(kv, now, 128, 128, main.slice(128, 128, 1), empty.index(b + 1), full.index(b + 1), parity, layout)
        load_part(kv, now, 256, 128, main.slice(256, 128, 1), empty.index(b + 2), full.index(b + 2), parity, layout)
        load_part(kv, now, 384, 128, main.slice(384, 128, 1), empty.index(b + 3), full.index(b + 3), parity, layout)
        load_part(kv, now, 512, 64, tail, empty.index(b + 4), full.index(b + 4), parity, layout)


@gluon.jit
def attend(
    q_mains, q_tails, mains, tails, p_shared, full, empty, indices, marks, row_breaks, out, lse, p_out, top_out,
    first_row, first_head, heads, T, K, pitch, tiles, scale, KEEP: gl.constexpr, M: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = p_shared.dtype
    logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16])
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    head, mine = rows(lines, 64), rows(lines, 64) < heads
    pair = (head * pitch)[:, None] + columns(lines, 64)[None, :]
    p_out += first_row * pitch
    top_head, top_mine = rows(logits, 64), rows(logits, 64) < heads
    top_out += first_row * (pitch // 64)
    top_row = top_head * (pitch // 64)

    q_main, q_tail = q_mains.index(0), q_tails.index(0)
    if M > 0:
        mark, mark_next = load_marks(marks, 0, K, logits), load_marks(marks, 1, K, logits)
        live = seen_pairs(mark, first_head, M, logits)
        row_break = gl.load(row_breaks + first_row + top_head, mask=top_mine, other=0.0)[:, None]
    else:
        live = live_columns(indices, 0, T, K, logits)
    x = gl.zeros([64, 64], gl.float32, logits)
    x = multiply_part(q_main, mains.index(0), 0, x, full.index(0), 0)
    x = multiply_part(q_main, mains.index(0), 128, x, full.index(1), 0)
    x = multiply_part(q_main, mains.index(0), 256, x, full.index(2), 0)
    x = multiply_part(q_main, mains.index(0), 384, x, full.index(3), 0)
    mbarrier.wait(full.index(4), 0)
    x = warpgroup_mma(q_tail, tails.index(0).permute((1, 0)), x, is_async=True)
    x = warpgroup_mma_wait(0, (x,))
    release(empty.index(4))
    if M > 0:
        x += row_break + breaks_of(mark)
    largest = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, logits))
    sums, _, largest = softmax_step(x, live, scale, largest)
    p_shared.store(sums.to(dtype))
    o0 = gl.zeros([64, 128], gl.float32, values)
    o1 = gl.zeros([64, 128], gl.float32, values)
    o2 = gl.zeros([64, 128], gl.float32, values)
    o3 = gl.zeros([64, 128], gl.float32, values)
    for tile in range(1, tiles):
        # Each product of the logits is followed by the release of a part of the tile before, as soon as that part's
        # product with the probabilities is done: its buffer fills again meanwhile.
        buffer, parity = tile & 1, (tile >> 1) & 1
        main, tail, b = mains.index(buffer), tails.index(buffer), buffer * PARTS
        before, e = mains.index(1 - buffer), (1 - buffer) * PARTS
        fence_async_shared()
        barrier()
        o0 = warpgroup_mma(p_shared, before.slice(0, 128, 1), o0, is_async=True)
        o1 = warpgroup_mma(p_shared, before.slice(128, 128, 1), o1, is_async=True)
        o2 = warpgroup_mma(p_shared, before.slice(256, 128, 1), o2, is_async=True)
        o3 = warpgroup_mma(p_shared, before.slice(384, 128, 1), o3, is_async=True)
        if M > 0:
            mark = mark_next
            mark_next = load_marks(marks, tile + 1, K, logits)
            live = seen_pairs(mark, first_head, M, logits)
        else:
            live = live_columns(indices, tile, T, K, logits)
        if KEEP:
            gl.store(top_out + top_row + (tile - 1), largest, mask=top_mine)
            gl.store(p_out + pair + (tile - 1) * 64, p_shared.load(lines), mask=mine[:, None])
        # A wait of 4 ends when all but the last four of the started products are done.
        x = gl.zeros([64, 64], gl.float32, logits)
        x = multiply_part(q_main, main, 0, x, full.index(b), parity)
        o0 = warpgroup_mma_wait(4, (o0,))
        release(empty.index(e))
        x = multiply_part(q_main, main, 128, x, full.index(b + 1), parity)
        o1 = warpgroup_mma_wait(4, (o1,))
        release(empty.index(e + 1))
        x = multiply_part(q_main, main, 256, x, full.index(b + 2), parity)
        o2 = warpgroup_mma_wait(4, (o2,))
        release(empty.index(e + 2))
        x = multiply_part(q_main, main, 384, x, full.index(b + 3), parity)
        mbarrier.wait(full.index(b + 4), parity)
        x = warpgroup_mma(q_tail, tail.permute((1, 0)), x, is_async=True)
        o3 = warpgroup_mma_wait(5, (o3,))
        release(empty.index(e + 3))
        x = warpgroup_mma_wait(0, (x,))
        release(empty.index(b + 4))
        if M > 0:
            x += row_break + breaks_of(mark)
        p, shrink, largest = softmax_step(x, live, scale, largest)
        sums = sums * shrink[:, None] + p
        p_shared.store(p.to(dtype))
        shrink = gl.convert_layout(shrink, gl.SliceLayout(1, values))[:, None]
        o0 *= shrink
        o1 *= shrink
        o2 *= shrink
        o3 *= shrink
    total = gl.sum(sums, 1)
    before = mains.index((tiles - 1) & 1)
    fence_async_shared()
    barrier()
    o0 = warpgroup_mma(p_shared, before.slice(0, 128, 1), o0, is_async=True)
    o1 = warpgroup_mma(p_shared, before.slice(128, 128, 1), o1, is_async=True)
    o2 = warpgroup_mma(p_shared, before.slice(256, 128, 1), o2, is_async=True)
    o3 = warpgroup_mma(p_shared, before.slice(384, 128, 1), o3, is_async=True)
    if KEEP:
        gl.store(top_out + top_row + (tiles - 1), largest, mask=top_mine)
        gl.store(p_out + pair + (tiles - 1) * 64, p_shared.load(lines), mask=mine[:, None])
    o0, o1, o2, o3 = warpgroup_mma_wait(0, (o0, o1, o2, o3))
    divisor = gl.where(total == 0, 1.0, total)  # a query without keys divides by 1; NaN stays
    share = (1 / gl.convert_layout(divisor, gl.SliceLayout(1, values)))[:, None]
    gl.store(
        lse + first_row + top_head,
        gl.where(total == 0, float("-inf"), (largest + gl.log2(divisor)) * LN2),
        mask=top_mine,
    )
    q_main.slice(0, 128, 1).store((o0 * share).to(dtype))
    q_main.slice(128, 128, 1).store((o1 * share).to(dtype))
    q_main.slice(256, 128, 1).store((o2 * share).to(dtype))
    q_main.slice(384, 128, 1).store((o3 * share).to(dtype))
    barrier()
    at = ((first_row + head) * 512)[:, None] + columns(lines, 512)[None, :]
    gl.store(out + at, q_main.load(lines), mask=mine[:, None])


@gluon.jit(do_not_specialize=["T"])
def forward_kernel(
    q, kv, indices, marks, row_breaks, out, lse, p_out, top_out, H, T, K, pitch, scale,
    KP: gl.constexpr, KEEP: gl.constexpr, M: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = kv.dtype.element_ty
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    t, first_head = query_and_head(H)
    first_row, heads = t * H + first_head, gl.minimum(H - first_head, 64)
    q_mains = gl.allocate_shared_memory(dtype, [1, 64, 512], shared)
    q_tails = gl.allocate_shared_memory(dtype, [1, 64, 64], shared)
    mains = gl.allocate_shared_memory(dtype, [2, 64, 512], shared)
    tails = gl.allocate_shared_memory(dtype, [2, 64, 64], shared)
    p_shared = gl.allocate_shared_memory(dtype, [64, 64], shared)
    full, empty = allocate_barriers(2 * PARTS, 128), allocate_barriers(2 * PARTS, 1)

    indices += t * K
    if M > 0:
        marks += t * K
    tiles = gl.maximum(used_tiles(indices, K, KP, 8), 1)
    load_query(q, first_row, heads, q_mains.index(0), q_tails.index(0), lines)
    gl.warp_specialize(
        [
            (attend, (
                q_mains, q_tails, mains, tails, p_shared, full, empty, indices, marks, row_breaks,
                out, lse, p_out, top_out, first_row, first_head, heads, T, K, pitch, tiles, scale, KEEP, M,
            )),
            (_load, (kv, indices, T, K, tiles, mains, tails, full, empty)),
        ],
        [4],
        [56],
    )  # fmt: skip


@dataclass(frozen=True)
class Folded:
    """Marks of the queries of a block, and of what is broken: q and kv themselves are finite.

    marks: (blocks, C) int32 of the places of a list, whose bit b says whether query b selected the key, and the sign
    whether the key is broken. row_breaks: (blocks, 128) float32, 0, or NaN if a query is broken. M: heads of a query.
    """

    marks: Tensor
    row_breaks: Tensor
    M: int


def forward(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    unscaled: tuple[Tensor, Tensor] | None = None,
    folded: Folded | None = None,
) -> None:
    """Writes out (S, H, 512) and lse (S, H). If `folded` is given, a row of q is a block of queries, folded.

    If `unscaled` is given, it also gets the probabilities (S, H, pitch) over exp2 of their tile's largest logit so far,
    and these logits (S, H, pitch / 64), up to the end of the last used tile. All contiguous, S > 0.
    """
    (S, H, _), K = q.shape, indices.shape[1]
    p, top = unscaled if unscaled is not None else (out, lse)  # not touched
    t = folded or Folded(indices, lse, 0)  # not touched
    forward_kernel[(cdiv(H, HEAD_BLOCK) * S,)](
        q, kv, indices, t.marks, t.row_breaks, out, lse, p, top, H, kv.shape[0], K, p.shape[2], scale,
        KP=padded(K), KEEP=unscaled is not None, M=t.M, num_warps=8,
    )  # fmt: skip
