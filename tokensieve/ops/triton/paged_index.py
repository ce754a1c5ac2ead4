"""Index scores from cache pages, equation (1), in Triton.

Legend: B sequences, n queries of each, P pages that a row of the page table names, H index heads (HP padded to a power
of two), D index width (DP padded). A program holds BQ queries x HP heads of one sequence as one side of a matrix
product (R) and walks over some of the sequence's pages, whose 64 keys are the other side (N).

Product, sum and scale are those of `index.py`, in the same order: a score has the bits that prefill gave it, however
many queries it is computed with. Keys past a sequence's last token are computed too, whatever they hold, because no
score depends on another key.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.quant import INDEX_WIDTH, PAGE_TOKENS
from tokensieve.ops.triton.index import ROWS, exact, load_rows, padded, relu

PAGE: tl.constexpr = tl.constexpr(PAGE_TOKENS)
# Three programs for each that runs at a time on a large GPU, so that sequences of different lengths fill it evenly.
PROGRAMS = 2048
MOST_PAGES = 16  # of a program: more would hardly save loads of queries, and programs would end less evenly


def inner_contiguous(pages: Tensor) -> Tensor:
    """Pages may lie apart, as those of one layer in a pool of all layers do; the bytes of a page may not."""
    return pages if pages.numel() == 0 or pages[0].is_contiguous() else pages.contiguous()


@triton.jit
def _scores_kernel(
    q, keys, scales, w, page_table, lengths, out, n, P, pages, stride, scale_stride, chunk,
    H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr,
    SCALED: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    blocks, s, d = (n + BQ - 1) // BQ, tl.arange(0, PAGE), tl.arange(0, DP)
    b, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    length = tl.minimum(tl.load(lengths + b), P * PAGE)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, (length + PAGE - 1) // PAGE)
    row, j = tl.arange(0, BQ * HP), block * BQ + tl.arange(0, BQ)
    owner, head = block * BQ + row // HP, row % HP
    real = (owner < n) & (head < H)
    q_RD = load_rows(q, (b * n + owner) * H + head, real, d, D)
    w_R = tl.load(w + (b * n + owner) * H + head, mask=real, other=0.0).to(tl.float32)
    page_table += b * P
    page = tl.load(page_table + begin, mask=begin < end, other=0)
    for i in tl.range(begin, end, num_stages=STAGES):
        after = tl.load(page_table + i + 1, mask=i + 1 < end, other=0)  # early, so that its keys need not wait
        known = (page >= 0) & (page < pages)
        place = tl.where(known, page, 0).to(tl.int64)
        k_ND = tl.load(keys + place * stride + s[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
        dots_NR = tl.dot(k_ND.to(q_RD.dtype), tl.trans(q_RD), input_precision=EXACT)
        score_NQ = tl.sum(tl.reshape(relu(dots_NR) * w_R[None, :], (PAGE, BQ, HP)), 2)
        if SCALED:
            score_NQ *= tl.load(scales + place * scale_stride + s)[:, None]
        score_NQ = tl.where(known, score_NQ, float("nan"))  # a missing page must not go unnoticed
        at = out + (b * n + j)[None, :] * P * PAGE + (s + i * PAGE)[:, None]
        tl.store(at, score_NQ, mask=(j < n)[None, :])
        page = after


def index_parts(index_pages: Tensor) -> tuple[Tensor, Tensor | None]:
    """Views of the pages: keys as they are stored, and float32 scales from a page's first scale on, if quantized."""
    if index_pages.dtype != torch.uint8:
        return index_pages, None
    scales = index_pages.view(torch.float32)[:, PAGE_TOKENS * INDEX_WIDTH // 4 :]
    return index_pages.view(torch.float8_e4m3fn), scales


def _as_pages(q: Tensor, keys: Tensor) -> Tensor:
    """q in the dtype of the product, which is its own dtype if every key is exact in it."""
    if q.dtype == keys.dtype or keys.dtype == torch.float8_e4m3fn:
        return q
    return q.to(keys.dtype) if q.dtype == torch.float8_e4m3fn else q.float()


def index_scores_paged(q_SHD: Tensor, index_pages: Tensor, w_SH: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
    (S, H, D), (B, P) = q_SHD.shape, page_table.shape
    scores_ST = torch.empty(S, P * PAGE_TOKENS, dtype=torch.float32, device=q_SHD.device)
    if 0 in (S, P, index_pages.shape[0]):
        return scores_ST
    n, HP, DP = S // B, padded(H), padded(D, 32)
    BQ = min(max(1, ROWS // HP), triton.next_power_of_2(n))
    rows = B * triton.cdiv(n, BQ)
    chunk = min(max(triton.cdiv(rows * P, PROGRAMS), 4), MOST_PAGES)
    index_pages = inner_contiguous(index_pages)
    keys, scales = index_parts(index_pages)
    q_SHD = _as_pages(q_SHD, keys)
    _scores_kernel[(rows, triton.cdiv(P, chunk))](
        q_SHD.contiguous(), keys, scales, w_SH.contiguous(), page_table.contiguous(), lengths.contiguous(), scores_ST,
        n, P, keys.shape[0], keys.stride(0), scales.stride(0) if scales is not None else 0, chunk,
        H=H, D=D, HP=HP, DP=DP, BQ=BQ, SCALED=scales is not None, EXACT=exact(q_SHD), STAGES=4, num_warps=4,
    )  # fmt: skip
    return scores_ST
