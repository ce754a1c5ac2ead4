"""Attention over selected entries of cache pages in Triton.

Legend: S queries (n of each sequence), P pages that a row of the page table names, H heads, G key-value groups, M heads
of a group, K selected, E entry width, V value width. A program holds one query: BH of a group's heads x tiles of BN
entries from one of `splits` pieces of the selection. A key is cut into a main part (DM wide) and a tail (DT), as in
`attention.py`: 576 = 512 + 64. Under MLA the main part is the value too. Entries are rounded to the queries' dtype,
which changes no quantized entry in bfloat16.

One query has too few heads to fill a GPU. So its selection is shared out among programs, and a second kernel joins
their results, each weighed by the exponential of its logsumexp. The number of pieces depends on the shapes alone: the
same call has the same bits.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.quant import LATENT_TOKEN_BYTES, LATENT_WIDTH, SCALE_BLOCK
from tokensieve.ops.triton.attention import LN2, LOG2E, head_block, load_part, store_part, used_places, widths
from tokensieve.ops.triton.index import exact, padded
from tokensieve.ops.triton.paged_index import PAGE, inner_contiguous

BN = 64
MULTIPROCESSORS = 132  # of an H100 or H200: programs that run at a time
MOST_PIECES = 32  # all of which one program joins, in registers
MOST_TILES = 256  # of a piece, whose places one program looks through in registers, unless there are too few pieces
GROUP: tl.constexpr = tl.constexpr(SCALE_BLOCK)

# Four E4M3 numbers in, four bfloat16 numbers out. An E4M3 number's bits, moved to bfloat16's places, are the number
# times 2^-120, also for subnormals; the two products undo that and apply the scale, and both are exact. Conversion
# instructions take several times as long as these moves. E4M3's NaN would become 480, but its block has a NaN as scale.
DEQUANTIZE: tl.constexpr = tl.constexpr("""{
    .reg .b32 x<2>, s<2>, power, minus_zero;
    mov.b32 power, 0x7B807B80;
    mov.b32 minus_zero, 0x80008000;
    prmt.b32 x0, $2, 0, 0x1404;
    prmt.b32 x1, $2, 0, 0x3424;
    and.b32 s0, x0, minus_zero;
    and.b32 s1, x1, minus_zero;
    shr.b32 x0, x0, 4;
    shr.b32 x1, x1, 4;
    lop3.b32 x0, x0, 0x07F007F0, s0, 0xEA;
    lop3.b32 x1, x1, 0x07F007F0, s1, 0xEA;
    fma.rn.bf16x2 x0, x0, power, minus_zero;
    fma.rn.bf16x2 x1, x1, power, minus_zero;
    fma.rn.bf16x2 $0, x0, $3, minus_zero;
    fma.rn.bf16x2 $1, x1, $4, minus_zero;
}""")


@triton.jit
def dequantized(value, scale, dtype: tl.constexpr, PTX: tl.constexpr):
    """value (N, D) as bytes, scale (N, D / 128) powers of two -> their products (N, D), in `dtype`."""
    N: tl.constexpr = value.shape[0]
    D: tl.constexpr = value.shape[1]
    parts = tl.reshape(value, (N, D // GROUP, GROUP))
    if PTX:
        both = parts, tl.broadcast_to(scale.to(tl.bfloat16)[:, :, None], parts.shape)
        product = tl.inline_asm_elementwise(DEQUANTIZE, "=r,=r,r,r,r", both, dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        product = (parts.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale[:, :, None]).to(dtype)
    return tl.reshape(product, (N, D))


@triton.jit
def entry_pages(indices, place, end, table, seen, pages):
    """The pages of the entries that `place` names, -1 for none that may be read, and their places in the pages."""
    index = tl.load(indices + place, mask=place < end, other=-1)
    page = tl.load(table + index // PAGE, mask=(index >= 0) & (index < seen), other=-1)
    return tl.where((page >= 0) & (page < pages), page, -1), (index % PAGE).to(tl.int32)


@triton.jit
def _split_kernel(
    q, values, scales, tails, indices, page_table, lengths, out, lse, K, n, P, pages, page_stride, chunk, splits, scale,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, d_k: tl.constexpr, v_start: tl.constexpr, d_v: tl.constexpr,
    token_stride: tl.constexpr,
    DM: tl.constexpr, DT: tl.constexpr, VP: tl.constexpr, SHARED: tl.constexpr,
    KP: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr,
    QUANTIZED: tl.constexpr, PTX: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Attention over places [split * chunk, (split + 1) * chunk) of a query's selection.

    lse is to base 2; if that piece is the WHOLE selection, it is the natural logarithm.
    """
    t, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    M: tl.constexpr = H // G
    blocks: tl.constexpr = (M + BH - 1) // BH
    if G > 1:
        g, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    else:  # known while compiling: one group costs nothing
        g, block = 0, tl.program_id(1)
    head, at = block * BH + tl.arange(0, BH), tl.arange(0, BN)
    mine, head = head < M, g * M + head
    row = t * H + head
    q_main = load_part(q, row * d_k, mine, d_k if d_k < DM else DM, DM)
    q_tail = load_part(q, row * d_k + DM, mine, d_k - DM, DT) if DT > 0 else q_main
    b = t // n
    seen = tl.minimum(tl.load(lengths + b), P * PAGE) - n + 1 + (t - b * n)
    page_table += b * P
    p_HN = tl.zeros((BH, BN), q_main.dtype)
    indices += t * K + split * chunk
    end = used_places(indices, tl.minimum(K - split * chunk, chunk), KP)
    largest = tl.zeros((BH,), tl.float32) + float("-inf")
    total = tl.zeros((BH,), tl.float32)
    acc_HV = tl.zeros((BH, VP), tl.float32)
    page, inside = entry_pages(indices, at, end, page_table, seen, pages)
    for first in range(0, end, BN):
        # Two dependent loads find the next tile's entries. Started here, they have the time of this tile's products.
        next_page, next_inside = entry_pages(indices, first + BN + at, end, page_table, seen, pages)
        live = page >= 0
        entry = page.to(tl.int64) * page_stride + (inside * token_stride + g * E)
        if QUANTIZED:
            bytes_ND = load_part(values, entry, live, DM, DM)
            at_scale = page.to(tl.int64) * (page_stride // 4) + inside * (token_stride // 4)
            scale_NG = load_part(scales, at_scale, live, DM // GROUP, DM // GROUP)
            main = dequantized(bytes_ND, scale_NG, q_main.dtype, PTX)
            value = main
        else:
            main = load_part(values, entry, live, d_k if d_k < DM else DM, DM).to(q_main.dtype)
            tail = load_part(values, entry + DM, live, d_k - DM, DT).to(q_main.dtype) if DT > 0 else main
            value = main if SHARED else load_part(values, entry + v_start, live, d_v, VP).to(q_main.dtype)
        shrink = tl.zeros((BH,), tl.float32)
        # Always true. If Triton sees that a product goes into another one, it gives the same rows to several warps, and
        # half of the work is done twice; a branch hides that. The two products of the logits are summed after scaling
        # for the same reason.
        if first < end:
            if QUANTIZED:  # not loaded ahead: there is no shared memory left for that
                at_tail = page.to(tl.int64) * (page_stride // 2) + inside * (token_stride // 2)
                tail = load_part(tails, at_tail, live, DT, DT).to(q_main.dtype)
            logit_HN = tl.dot(q_main, tl.trans(main), input_precision=EXACT) * (scale * LOG2E)
            if DT > 0:
                logit_HN += tl.dot(q_tail, tl.trans(tail), input_precision=EXACT) * (scale * LOG2E)
            logit_HN = tl.where(live[None, :], logit_HN, float("-inf"))
            now = tl.maximum(largest, tl.max(logit_HN, 1))
            base = tl.where(now == float("-inf"), 0.0, now)  # before the first key: -inf minus -inf would be NaN
            e_HN = tl.exp2(logit_HN - base[:, None])
            shrink = tl.exp2(largest - base)
            total = total * shrink + tl.sum(e_HN, 1)
            p_HN, largest = e_HN.to(q_main.dtype), now
        acc_HV = tl.dot(p_HN, value, acc_HV * shrink[:, None], input_precision=EXACT)
        page, inside = next_page, next_inside
    divisor = tl.where(total == 0, 1.0, total)  # a query without keys divides by 1; NaN stays
    row = (t * splits + split) * H + head
    store_part(out, row * d_v, mine, acc_HV / divisor[:, None], d_v, VP)
    lse_H = tl.where(total == 0, float("-inf"), largest + tl.log2(divisor))
    tl.store(lse + row, lse_H * LN2 if WHOLE else lse_H, mask=mine)


@triton.jit
def _join_kernel(
    parts, part_lse, out, lse, splits, H: tl.constexpr, d_v: tl.constexpr, VP: tl.constexpr, SP: tl.constexpr
):
    """One head of a query: out = sum_i 2^lse_i out_i / sum_i 2^lse_i over the pieces, and the natural logsumexp."""
    t, head, i = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, SP)
    row = (t * splits + i) * H + head
    lse_P = tl.load(part_lse + row, mask=i < splits, other=float("-inf"))
    part_PV = load_part(parts, row * d_v, i < splits, d_v, VP)
    largest = tl.max(lse_P, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    weight_P = tl.exp2(lse_P - base)
    total = tl.sum(weight_P, 0)
    divisor = tl.where(total == 0, 1.0, total)  # a query without keys divides by 1; NaN stays
    v = tl.arange(0, VP)
    tl.store(out + (t * H + head) * d_v + v, tl.sum(part_PV * weight_P[:, None], 0) / divisor, mask=v < d_v)
    tl.store(lse + t * H + head, tl.where(total == 0, float("-inf"), (base + tl.log2(divisor)) * LN2))


def steps(programs: int, tiles: int, pieces: int) -> int:
    """How many tiles a multiprocessor goes through in turn if `programs` of `tiles` tiles are cut into pieces."""
    # starting and ending a program, with its share of the joining, takes about as long as two tiles
    return triton.cdiv(programs * pieces, MULTIPROCESSORS) * (triton.cdiv(tiles, pieces) + 2)


@lru_cache
def pieces(programs: int, tiles: int) -> int:
    """Into how many pieces `programs` of `tiles` tiles are cut: the fewest of those that need the fewest steps."""
    least = min(triton.cdiv(tiles, MOST_TILES), MOST_PIECES)
    return min(range(least, min(tiles, MOST_PIECES) + 1), key=lambda count: steps(programs, tiles, count))


def latent_parts(pages: Tensor, rope: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of quantized pages that begin at the first E4M3 number, scale and rope dim; plain pages three times."""
    if pages.dtype != torch.uint8:
        return pages, pages, pages
    scales = pages.view(torch.float32)[..., LATENT_WIDTH // 4 :]
    return pages, scales, pages.view(torch.bfloat16)[..., LATENT_TOKEN_BYTES // 2 - rope :]


def join(parts_SPHV: Tensor, lse_SPH: Tensor, out_SHV: Tensor, lse_SH: Tensor) -> None:
    """Writes out and lse, joined from those of the pieces, which are float32 with lse to base 2."""
    (S, splits, H, d_v) = parts_SPHV.shape
    VP, SP = padded(d_v), triton.next_power_of_2(splits)
    _join_kernel[(S, H)](parts_SPHV, lse_SPH, out_SHV, lse_SH, splits, H=H, d_v=d_v, VP=VP, SP=SP, num_warps=4)


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
    (S, H, _), (B, P), K = q_SHD.shape, page_table.shape, indices_SK.shape[1]
    G = entry_pages.shape[2] if entry_pages.dim() == 4 else 1
    out, lse = q_SHD.new_empty(S, H, d_v), q_SHD.new_empty(S, H, dtype=torch.float32)
    if S == 0:
        return out, lse
    if 0 in (K, P, entry_pages.shape[0]):
        return out.zero_(), lse.fill_(float("-inf"))
    quantized = entry_pages.dtype == torch.uint8
    values, scales, tails = latent_parts(inner_contiguous(entry_pages), d_k - LATENT_WIDTH)
    # wide products of fewer than 64 rows would miss Hopper's fast path, and run out of registers
    BH, tiles = 64 if d_v > 128 else head_block(H // G), triton.cdiv(K, BN)
    blocks = G * triton.cdiv(H // G, BH)
    chunk = triton.cdiv(tiles, pieces(S * blocks, tiles)) * BN
    splits = triton.cdiv(K, chunk)
    parts, part_lse = out, lse
    if splits > 1:
        parts = torch.empty(S, splits, H, d_v, dtype=torch.float32, device=q_SHD.device)
        part_lse = parts.new_empty(S, splits, H)
    _split_kernel[(S, blocks, splits)](
        q_SHD.contiguous(), values, scales, tails,
        indices_SK.contiguous(), page_table.contiguous(), lengths.contiguous(),
        parts, part_lse, K, S // B, P, values.shape[0], values.stride(0), chunk, splits, scale,
        H=H, G=G, E=entry_pages.shape[-1], d_k=d_k, v_start=v_start, d_v=d_v, token_stride=values[0, 0].numel(),
        **widths(d_k, v_start, d_v), KP=triton.next_power_of_2(chunk), BH=BH, BN=BN,
        WHOLE=splits == 1, QUANTIZED=quantized,
        PTX=quantized and q_SHD.dtype == torch.bfloat16 and torch.version.hip is None,
        EXACT=exact(q_SHD), num_warps=8 if d_v > 128 else 4, num_stages=3 if quantized else 2,
    )  # fmt: skip
    if splits > 1:
        join(parts, part_lse, out, lse)
    return out, lse
