"""Attention over selected entries of quantized cache pages on Hopper, for decode.

Legend: S queries (n of each sequence), P pages that a row of the page table names, H heads, K selected.

The eight warps that compute are those of `forward`; the four that load make bfloat16 of the pages' E4M3 and scales on the way. One query
has too few heads to fill a GPU: its selection is cut into pieces by the shapes alone, and joined as in `tokensieve.ops.triton.paged_attention`,
which also runs what is not the 671B model's shape.
"""

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from tokensieve.ops.hopper.forward import attend
from tokensieve.ops.hopper.warps import BLOCK, PARTS, VALUE, allocate_barriers, barrier, columns, load_block, release, rows, used_tiles
from tokensieve.ops.triton.paged_attention import DEQUANTIZE, join, latent_parts, pieces
from tokensieve.ops.triton.paged_index import inner_contiguous


@gluon.jit
def _entries(indices, tile, K, table, seen, pages, page_stride, layout: gl.constexpr):
    """Where in the pool the entries of a tile's places begin, in bytes; -1 where a place names none, or none that may be read."""
    at = tile * 64 + rows(layout, 64)
    index = gl.load(indices + at, mask=at < K, other=-1)
    page = gl.load(table + index // 64, mask=(index >= 0) & (index < seen), other=-1)
    return gl.where((page >= 0) & (page < pages), page.to(gl.int64) * page_stride + index % 64 * 656, -1)


@gluon.jit
def _bytes(values, entry, part: gl.constexpr, layout: gl.constexpr):
    at = entry[:, None] + (128 * part + columns(layout, 128))[None, :]
    return gl.load(values + at, mask=(entry >= 0)[:, None], other=0)


@gluon.jit
def _put(bytes, scales, entry, part: gl.constexpr, main, empty, full, parity):
    """bytes x scale, exact in bfloat16, to columns 128 part to 128 part + 127 of a tile."""
    scale = gl.load(scales + entry // 4 + part, mask=entry >= 0, other=0.0).to(gl.bfloat16)
    scale, bytes = gl.broadcast(scale[:, None], bytes)
    value = gl.inline_asm_elementwise(DEQUANTIZE, "=r,=r,r,r,r", [bytes, scale], dtype=gl.bfloat16, is_pure=True, pack=4)
    mbarrier.wait(empty, parity)
    main.slice(128 * part, 128, 1).store(value)
    fence_async_shared()
    release(full)


@gluon.jit
def _load(values, scales, ropes, indices, K, table, seen, pages, page_stride, tiles, mains, tails, lives, full, empty):
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    entry = _entries(indices, 0, K, table, seen, pages, page_stride, layout)
    for tile in range(tiles):
        buffer, parity = tile & 1, ((tile >> 1) & 1) ^ 1
        main, b, now = mains.index(buffer), buffer * PARTS, entry
        first, second = _bytes(values, now, 0, layout), _bytes(values, now, 1, layout)
        entry = _entries(indices, tile + 1, K, table, seen, pages, page_stride, layout)
        _put(first, scales, now, 0, main, empty.index(b), full.index(b), parity)
        _put(second, scales, now, 1, main, empty.index(b + 1), full.index(b + 1), parity)
        first, second = _bytes(values, now, 2, layout), _bytes(values, now, 3, layout)
        at = (now // 2)[:, None] + (264 + columns(layout, 64))[None, :]
        rope = gl.load(ropes + at, mask=(now >= 0)[:, None], other=0.0)
        _put(first, scales, now, 2, main, empty.index(b + 2), full.index(b + 2), parity)
        _put(second, scales, now, 3, main, empty.index(b + 3), full.index(b + 3), parity)
        mbarrier.wait(empty.index(b + 4), parity)
        tails.index(buffer).store(rope)
        lives.index(buffer).store((now >= 0).to(gl.int32))
        fence_async_shared()
        release(full.index(b + 4))


@gluon.jit
def decode_kernel(
    q, values, scales, ropes, indices, page_table, lens, out, lse, H, K, n, P, pages, page_stride, chunk, scale,
    KP: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q.dtype.element_ty
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    t, piece, first_head = gl.program_id(1).to(gl.int64), gl.program_id(2), gl.program_id(0) * 64
    heads = gl.minimum(H - first_head, 64)
    q_mains = gl.allocate_shared_memory(dtype, [1, 64, 512], shared)
    q_tails = gl.allocate_shared_memory(dtype, [1, 64, 64], shared)
    mains = gl.allocate_shared_memory(dtype, [2, 64, 512], shared)
    tails = gl.allocate_shared_memory(dtype, [2, 64, 64], shared)
    p_shared = gl.allocate_shared_memory(dtype, [64, 64], shared)
    lives = gl.allocate_shared_memory(gl.int32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, empty = allocate_barriers(2 * PARTS, 1), allocate_barriers(2 * PARTS, 1)

    b = t // n
    seen = gl.minimum(gl.load(lens + b), P * 64) - n + 1 + (t - b * n).to(gl.int32)
    page_table += b * P
    indices += t * K + piece * chunk
    places = gl.minimum(K - piece * chunk, chunk)
    tiles = gl.maximum(used_tiles(indices, places, KP, 8), 1)
    row, mine = (t * H + first_head + rows(lines, 64)) * 576, rows(lines, 64) < heads
    for part in gl.static_range(4):
        load_block(q, row, mine, 128 * part, 128, q_mains.index(0).slice(128 * part, 128, 1), lines)
    load_block(q, row, mine, 512, 64, q_tails.index(0), lines)
    fence_async_shared()
    barrier()
    first_row = (t * gl.num_programs(2) + piece) * H + first_head
    gl.warp_specialize(
        [
            (attend, (
                q_mains, q_tails, mains, tails, p_shared, lives, full, empty, indices, out, lse, out, lse,
                first_row, heads, seen, places, 64, tiles, scale, False, True, PIECE,
            )),
            (_load, (
                values, scales, ropes, indices, places, page_table, seen, pages, page_stride, tiles,
                mains, tails, lives, full, empty,
            )),
        ],
        [4],
        [88],
    )  # fmt: skip


def sparse_attention_paged(
    q_SHD: Tensor, latent_pages: Tensor, indices_SK: Tensor, page_table: Tensor, lens: Tensor, scale: float, d_v: int
) -> tuple[Tensor, Tensor]:
    (S, H, E), (B, P), K = q_SHD.shape, page_table.shape, indices_SK.shape[1]
    out, lse = q_SHD.new_empty(S, H, VALUE), q_SHD.new_empty(S, H, dtype=torch.float32)
    if S == 0:
        return out, lse
    if 0 in (K, P, latent_pages.shape[0]):
        return out.zero_(), lse.fill_(float("-inf"))
    values, scales, ropes = latent_parts(inner_contiguous(latent_pages), 0)
    blocks, tiles = cdiv(H, BLOCK), cdiv(K, BLOCK)
    chunk = cdiv(tiles, pieces(S * blocks, tiles)) * BLOCK
    splits = cdiv(K, chunk)
    parts, part_lse = out, lse
    if splits > 1:
        parts = torch.empty(S, splits, H, VALUE, dtype=torch.float32, device=q_SHD.device)
        part_lse = parts.new_empty(S, splits, H)
    decode_kernel[(blocks, S, splits)](
        q_SHD.contiguous(), values, scales, ropes, indices_SK.contiguous(), page_table.contiguous(), lens.contiguous(),
        parts, part_lse, H, K, S // B, P, values.shape[0], values.stride(0), chunk, scale,
        KP=next_power_of_2(chunk), PIECE=splits > 1, num_warps=8,
    )  # fmt: skip
    if splits > 1:
        join(parts, part_lse, out, lse)
    return out, lse
