"""The ops of decoding, on caches in pages of 64 tokens; `tokensieve.ops` offers them with the others.

Legend: S query tokens, B sequences, n queries of a sequence, P pages that a row of the page table names, T = 64 * P
tokens, H heads, G key-value groups (head h reads group h // (H/G)), K places for selected keys, D index width, E entry
width, L and R widths of an entry's first and second part, N tokens to write.

S = B * n: queries [b * n, (b + 1) * n) are the last n tokens of sequence b, n = 1 in plain decoding, more if next
tokens were drafted. Query j of n sees the tokens [0, lengths - n + 1 + j) of its sequence. `page_table` (B, P) int32
holds the physical page of each logical page; entries past a sequence's last token are never read, and may be anything.
`lengths` (B) int32 counts each sequence's tokens, 0 <= lengths <= T. Sequences may share pages. Bytes of a page that no
token of a sequence owns may be anything, NaN too.

A token has one entry for each key-value group, in `entry_pages`, and one index key, in `index_pages`.

- Quantized pages (uint8) have the layouts of `quant.pack_latent_page` and `quant.pack_index_page`. Their entries are
  MLA's: one group, E = 576, the latent (512), then the rope dims (64).
- Plain pages are bfloat16, float16 or float32, for hardware without FP8 and for other widths. entry_pages are
  (pages, 64, E) with one group, or (pages, 64, G, E) for grouped-query attention; index_pages are (pages, 64, D).

Values of tables, indices, slots and lengths are checked on the CPU only: elsewhere that would stop the queue. No op
here has a gradient: inputs are detached.
"""

import torch
from torch import Tensor

from tokensieve.ops import paged_checks as checks
from tokensieve.ops import table
from tokensieve.ops.quant import INDEX_WIDTH, LATENT_WIDTH


def quantize_queries(
    q_SHD: Tensor, w_SH: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Queries for keys on quantized pages: e4m3(H r(q) / sqrt(D)), a scale a head, which is folded into w.

    q (S, H_I, D = 128) floating, w (S, H_I) floating. cos, sin (S, 1, R) float32: r rotates the first R numbers
    half-split, x * cos + roll(x, R/2) * sin; without them q is rotated already. Scales are powers of two. Returns
    values (S, H_I, D) float8_e4m3fn and w times the scales (S, H_I) float32: what `index_scores` and
    `index_scores_paged` take. No gradient.

    ValueError on mismatched shapes and other dtypes. For a NaN or an infinity the reference raises ValueError, while
    the Triton kernel makes a NaN of that head's w.
    Sources: the indexer of the official demo (`rotate_activation`, `act_quant`).
    """
    op = "quantize_queries"
    checks.queries(op, q_SHD, INDEX_WIDTH, checks.QUERIES)
    checks.head_weights(op, q_SHD, w_SH)
    checks.rotation_tables(op, q_SHD, cos, sin)
    return table.quantize_queries(q_SHD, w_SH, cos, sin, backend)


def index_scores_paged(
    q_SHD: Tensor, index_pages: Tensor, w_SH: Tensor, page_table: Tensor, lengths: Tensor, *, backend: str = "auto"
) -> Tensor:
    """I[t,s] = k_scale[s] * sum_j w[t,j] * relu(q[t,j] . k[s]): equation (1), s over the tokens of t's own sequence.

    q (S, H_I, D) floating or float8_e4m3fn, used as it is given: for quantized keys `quantize_queries` makes it, or the
    caller rotated it by `quant.hadamard`, quantized it and folded its scale into w. w (S, H_I) floating, with every
    scale of the query folded in. index_pages (pages, 8448) uint8, D = 128, the key's scale multiplying the score; or
    (pages, 64, D) plain, without a scale. page_table (B, P) and lengths (B) int32.
    Returns (S, T) float32 (float64 for a float64 q), T = 64 * P; unspecified past what a query sees. The bits are those
    of `index_scores` on the same keys and scales: prefill and decode select alike. No gradient.

    ValueError on mismatched shapes, other dtypes, and on the CPU pages outside [0, pages) or lengths outside [0, T].
    Sources: DeepSeek-V3.2-Exp report, equation (1); the official demo's key cache; the layout of DeepGEMM's paged MQA
    logits.
    """
    op = "index_scores_paged"
    checks.queries(op, q_SHD, checks.index_pages(op, index_pages), (torch.float8_e4m3fn, *checks.QUERIES))
    checks.head_weights(op, q_SHD, w_SH)
    checks.page_table(op, q_SHD.shape[0], index_pages, page_table, lengths)
    return table.index_scores_paged(q_SHD, index_pages, w_SH, page_table, lengths, backend)


def sparse_attention_paged(
    q_SHD: Tensor,
    entry_pages: Tensor,
    indices_SK: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    d_k: int | None = None,
    v_start: int = 0,
    d_v: int = LATENT_WIDTH,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """u_t = Attention(h_t, {c_s : s in S_t}), the second half of equation (2), on the entries of t's own sequence.

    An entry's key is [0:d_k], by default all of it, its value [v_start:v_start+d_v]. MLA in MQA mode: one group, the
    whole entry and its latent, d_k = E, v_start = 0, d_v = L. Grouped-query attention: E = 2d, d_k = d, v_start = d,
    d_v = d. entry_pages (pages, 64, 656) uint8, E = 576, read into float32, d_k = 576, v_start = 0, d_v = 512; or plain
    (pages, 64, E) with one group or (pages, 64, G, E). q (S, H, d_k) bfloat16, float16, float32 or float64. indices
    (S, K) int32 or int64: positions within the query's own sequence, -1 for an unused place. page_table (B, P) and
    lengths (B) int32.
    Returns out (S, H, d_v) in q's dtype and lse (S, H) float32 (float64 for a float64 q), the natural log; zeros and
    -inf for a query that selects nothing. They are those of `sparse_attention` on the dequantized entries. No gradient.

    ValueError on mismatched shapes, other dtypes, and on the CPU pages outside [0, pages), lengths outside [0, T], or
    an index below -1 or past what its query sees; elsewhere such an index counts as unused.
    Sources: DeepSeek-V3.2-Exp report, section 2.1; the latent cache of the official demo's MLA; the layout of
    FlashMLA's sparse FP8 decode. Grouped-query attention: arXiv 2305.13245.
    """
    op = "sparse_attention_paged"
    d_k = checks.entries(op, q_SHD, entry_pages, d_k, v_start, d_v)
    checks.page_table(op, q_SHD.shape[0], entry_pages, page_table, lengths)
    checks.indices(op, q_SHD.shape[0], indices_SK, lengths)
    return table.sparse_attention_paged(
        q_SHD, entry_pages, indices_SK, page_table, lengths, scale, d_k, v_start, d_v, backend
    )


def write_caches(
    first: Tensor,
    second: Tensor,
    k_I: Tensor,
    entry_pages: Tensor,
    index_pages: Tensor,
    slots: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Writes N tokens into both caches, in place: an entry for each group, its two parts beside each other, and a key.

    first and second, floating, are the parts of the entries: for quantized pages and pages of one group (N, L) and
    (N, R), under MLA the latent and the rope dims, already rotated by position; for pages with a group axis (N, G, L)
    and (N, G, R), in grouped-query attention keys and values. E = L + R. k_I (N, D) floating. slots (N) int32 or int64:
    physical page * 64 + place in the page; negative: this token is skipped, and may hold anything. Of two tokens with
    the same slot either may stay. Every other byte of the pages stays as it was. No gradient.

    entry_pages (pages, 64, 656) uint8 with L = 512, R = 64: e4m3(first), scales, which are powers of two, second in
    bfloat16; or plain (pages, 64, E) or (pages, 64, G, E). index_pages (pages, 8448) uint8 with D = 128:
    e4m3(H k_I / sqrt(D)), rotated by `quant.hadamard`, and a scale, a power of two; or plain (pages, 64, D): k_I as it
    is, not rotated.

    ValueError on mismatched shapes, other dtypes, on the CPU slots outside the pages, and for a NaN or an infinity that
    would have to be quantized, before anything is written. The Triton kernel skips slots outside the pages, and stores
    a NaN as the scale of a block that cannot be quantized.
    Sources: the caches and `act_quant` of the official demo; FlashMLA's and DeepGEMM's layouts, which `quant`
    describes.
    """
    checks.writes("write_caches", first, second, k_I, entry_pages, index_pages, slots)
    table.write_caches(first, second, k_I, entry_pages, index_pages, slots, backend)
