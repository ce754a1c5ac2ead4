"""Attention over selected entries of quantized cache pages: the kernel of `forward` with other warps that load.

Legend: S queries, H heads, K selected.

The bytes of a tile's part are copied to where its bfloat16 numbers will be, each row of 128 bytes into the 256 bytes
that it becomes, as soon as that place is free. Then the four warps that load take them into registers and write the
numbers over them: beside two tiles and the queries there is no room for bytes.
"""

import torch
from torch import Tensor
from triton import cdiv
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from tokensieve.ops.hopper.forward import attend
from tokensieve.ops.hopper.warps import (
    HEAD_BLOCK,
    PARTS,
    TILE,
    VALUE,
    VIEWS,
    allocate_barriers,
    barrier,
    columns,
    copy_async,
    load_query,
    load_tile_index,
    query_and_head,
    release,
    used_tiles,
)
from tokensieve.ops.quant import LATENT_TOKEN_BYTES, PAGE_TOKENS
from tokensieve.ops.triton.index import padded
from tokensieve.ops.triton.paged_attention import DEQUANTIZE, latent_parts, pieces, steps
from tokensieve.ops.triton.paged_places import pool_places

PAGE: gl.constexpr = gl.constexpr(PAGE_TOKENS)
TOKEN: gl.constexpr = gl.constexpr(LATENT_TOKEN_BYTES)


@gluon.jit
def _begin_part(values, scales, at, live, part: gl.constexpr, bytes, empty, parity, layout: gl.constexpr):
    """Starts the copy of 128 bytes of each entry to `bytes`, once that place is free; zeros if not `live`.

    Returns their scales.
    """
    mbarrier.wait(empty, parity)
    copy_async(bytes, values + (at[:, None] + (128 * part + columns(layout, 128))[None, :]), mask=live[:, None])
    async_copy.commit_group()
    return gl.load(scales + (at // 4 + part), mask=live, other=0.0)


@gluon.jit
def _entries(places, tile, T, K, page_stride, layout: gl.constexpr):
    """Where in the pool a tile's entries begin, in bytes, 0 for a place that names none; and which places name one."""
    place = load_tile_index(places, tile, T, K, layout)
    live = place >= 0
    # The place is chosen, not the byte: the compiler would not know that a choice between bytes is a multiple of 16.
    place = gl.where(live, place, 0)
    return (place // PAGE).to(gl.int64) * page_stride + place % PAGE * TOKEN, live


@gluon.jit
def _begin(values, scales, ropes, at, live, tile, raw, tails, empty, layout: gl.constexpr, wide: gl.constexpr):
    """Starts the copies of a tile: its bytes and its tail. Returns the scales of its four parts."""
    buffer, parity = tile & 1, ((tile >> 1) & 1) ^ 1
    b, r = buffer * PARTS, buffer * 8
    scale0 = _begin_part(values, scales, at, live, 0, raw.index(r), empty.index(b), parity, layout)
    scale1 = _begin_part(values, scales, at, live, 1, raw.index(r + 2), empty.index(b + 1), parity, layout)
    scale2 = _begin_part(values, scales, at, live, 2, raw.index(r + 4), empty.index(b + 2), parity, layout)
    scale3 = _begin_part(values, scales, at, live, 3, raw.index(r + 6), empty.index(b + 3), parity, layout)
    mbarrier.wait(empty.index(b + 4), parity)
    at, live = gl.convert_layout(at, gl.SliceLayout(1, wide)), gl.convert_layout(live, gl.SliceLayout(1, wide))
    copy_async(tails.index(buffer), ropes + ((at // 2)[:, None] + columns(wide, 64)[None, :]), mask=live[:, None])
    async_copy.commit_group()
    return scale0, scale1, scale2, scale3


@gluon.jit
def _numbers(bytes, scale):
    scale, bytes = gl.broadcast(scale.to(gl.bfloat16)[:, None], bytes)
    return gl.inline_asm_elementwise(DEQUANTIZE, "=r,=r,r,r,r", [bytes, scale], dtype=gl.bfloat16, is_pure=True, pack=4)


@gluon.jit
def _finish(
    raw, r, scale_a, scale_b, main, begin: gl.constexpr, full_a, full_b, after: gl.constexpr, layout: gl.constexpr
):
    """Replaces the bytes of two parts by bytes x scale, exact in bfloat16; `after` copies may still be under way."""
    async_copy.wait_group(after)
    a, b = raw.index(r).load(layout), raw.index(r + 2).load(layout)
    barrier()  # all have read their bytes
    main.slice(begin, 128, 1).store(_numbers(a, scale_a))
    main.slice(begin + 128, 128, 1).store(_numbers(b, scale_b))
    fence_async_shared()
    release(full_a)
    release(full_b)


@gluon.jit
def _load(values, scales, ropes, places, T, K, page_stride, tiles, mains, tails, full, empty):
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    # a part of a tile, 64 x 128 bfloat16, has room for twice its bytes
    lines: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    if VIEWS:
        raw = mains.reinterpret(gl.uint8, [16, 64, 128], lines)
    else:
        raw = mains._reinterpret(gl.uint8, [16, 64, 128], lines)
    at, live = _entries(places, 0, T, K, page_stride, layout)
    s0, s1, s2, s3 = _begin(values, scales, ropes, at, live, 0, raw, tails, empty, layout, wide)
    at, live = _entries(places, 1, T, K, page_stride, layout)
    for tile in range(tiles):
        buffer = tile & 1
        main, b, r = mains.index(buffer), buffer * PARTS, buffer * 8
        _finish(raw, r, s0, s1, main, 0, full.index(b), full.index(b + 1), 3, layout)
        _finish(raw, r + 4, s2, s3, main, 256, full.index(b + 2), full.index(b + 3), 1, layout)
        async_copy.wait_group(0)
        fence_async_shared()
        release(full.index(b + 4))
        # after the last tile these are copies of zeros, to where the tile before it was
        s0, s1, s2, s3 = _begin(values, scales, ropes, at, live, tile + 1, raw, tails, empty, layout, wide)
        at, live = _entries(places, tile + 2, T, K, page_stride, layout)  # early, so that the next copies need not wait
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["T"])
def decode_kernel(
    q, values, scales, ropes, places, out, lse, H, T, K, page_stride, scale, KP: gl.constexpr
):  # fmt: skip
    dtype: gl.constexpr = q.dtype.element_ty
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    t, first_head = query_and_head(H)
    first_row, heads = t * H + first_head, gl.minimum(H - first_head, 64)
    q_mains = gl.allocate_shared_memory(dtype, [1, 64, 512], shared)
    q_tails = gl.allocate_shared_memory(dtype, [1, 64, 64], shared)
    mains = gl.allocate_shared_memory(dtype, [2, 64, 512], shared)
    tails = gl.allocate_shared_memory(dtype, [2, 64, 64], shared)
    p_shared = gl.allocate_shared_memory(dtype, [64, 64], shared)
    full, empty = allocate_barriers(2 * PARTS, 1), allocate_barriers(2 * PARTS, 1)

    places += t * K
    tiles = gl.maximum(used_tiles(places, K, KP, 8), 1)
    load_query(q, first_row, heads, q_mains.index(0), q_tails.index(0), lines)
    gl.warp_specialize(
        [
            (attend, (
                q_mains, q_tails, mains, tails, p_shared, full, empty, places, places, lse, out, lse, out, lse,
                first_row, first_head, heads, T, K, K, tiles, scale, False, 0,
            )),
            (_load, (values, scales, ropes, places, T, K, page_stride, tiles, mains, tails, full, empty)),
        ],
        [4],
        [88],
    )  # fmt: skip


def sparse_attention_paged(
    q_SHD: Tensor,
    entry_pages: Tensor,
    indices_SK: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
) -> tuple[Tensor, Tensor]:
    (S, H, E), pages = q_SHD.shape, entry_pages.shape[0]
    out, lse = q_SHD.new_empty(S, H, VALUE), q_SHD.new_empty(S, H, dtype=torch.float32)
    if 0 in (S, pages, page_table.shape[1], indices_SK.shape[1]):
        return out.zero_(), lse.fill_(float("-inf"))
    places = pool_places(indices_SK, page_table, lengths, pages, TILE)
    K = places.shape[1]
    decode_kernel[(cdiv(H, HEAD_BLOCK) * S,)](
        q_SHD.contiguous(), *latent_parts(entry_pages, E - VALUE), places, out, lse,
        H, pages * PAGE_TOKENS, K, entry_pages.stride(0), scale, KP=padded(K), num_warps=8,
    )  # fmt: skip
    return out, lse


def beats_pieces(queries: int, heads: int, places: int) -> bool:
    """Whether this kernel finishes whole selections sooner than the portable kernel finishes them in pieces.

    Here a program has one query and 64 heads. `tokensieve.ops.triton.paged_attention` cuts selections into pieces if
    programs are few. A tile takes three quarters of the time here.
    """
    programs, tiles = queries * cdiv(heads, HEAD_BLOCK), cdiv(places, TILE)
    return 3 * steps(programs, tiles, 1) <= 4 * steps(programs, tiles, pieces(programs, tiles))
