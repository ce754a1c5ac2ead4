"""The ops of decoding, on caches in pages of 64 tokens; `tokensieve.ops` offers them with the others.

Legend: S query tokens, B sequences, n queries of a sequence, P pages that a row of the page table names, T = 64 * P tokens, H heads, K
places for selected keys, D index width, E entry width, L latent width, R rope width, N tokens to write.

S = B * n: queries [b * n, (b + 1) * n) are the last n tokens of sequence b, n = 1 in plain decoding, more when next tokens were drafted.
Query j of n sees the tokens [0, lengths - n + 1 + j) of its sequence. `page_table` (B, P) int32 holds the physical page of each logical page;
entries past a sequence's last token are never read, and may be anything. `lengths` (B) int32 counts each sequence's tokens, 0 <= lengths <= T.
Sequences may share pages. Bytes of a page that no token of a sequence owns may be anything, NaN too.

Pages are quantized (uint8, the layouts of `quant.pack_latent_page` and `quant.pack_index_page`), or plain: (pages, 64, width) bfloat16,
float16 or float32, where the hardware has no FP8 or the widths differ. Values of tables, indices, slots and lengths are checked on the CPU
only: elsewhere that would stop the queue. No op here has a gradient: inputs are detached.
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

    q (S, H_I, D = 128) floating, w (S, H_I) floating. cos, sin (S, 1, R) float32: r rotates the first R numbers half-split, x * cos +
    roll(x, R/2) * sin; without them q is rotated already. Scales are powers of two. Returns values (S, H_I, D) float8_e4m3fn and w times
    the scales (S, H_I) float32: what `index_scores` and `index_scores_paged` take. No gradient.
    ValueError on mismatched shapes, other dtypes, and for a NaN or an infinity; the Triton kernel makes a NaN of that head's w instead.
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
    """I[t,s] = k_scale[s] * sum_j w[t,j] * relu(q[t,j] . k[s]): equation (1), s over the tokens of the query's own sequence.

    q (S, H_I, D) floating or float8_e4m3fn, used as it is given: for quantized keys the caller rotated it by `quant.hadamard`, quantized it
    and folded its scale into w. w (S, H_I) floating, with every scale of the query folded in. index_pages (pages, 8448) uint8, D = 128, the
    key's scale multiplying the score; or (pages, 64, D) plain, without a scale. page_table (B, P) and lengths (B) int32.
    Returns (S, T) float32 (float64 for a float64 q), T = 64 * P; past what a query sees unspecified. The bits are
    those of `index_scores` on the same keys and scales: prefill and decode select alike. No gradient.
    ValueError on mismatched shapes, other dtypes, and on the CPU pages outside [0, pages) or lengths outside [0, T].
    Sources: DeepSeek-V3.2-Exp report, equation (1); the official demo's key cache; the layout of DeepGEMM's paged MQA logits.
    """
    op = "index_scores_paged"
    checks.queries(op, q_SHD, checks.index_pages(op, index_pages), (torch.float8_e4m3fn, *checks.QUERIES))
    checks.head_weights(op, q_SHD, w_SH)
    checks.page_table(op, q_SHD.shape[0], index_pages, page_table, lengths)
    return table.index_scores_paged(q_SHD, index_pages, w_SH, page_table, lengths, backend)


def sparse_attention_paged(
    q_SHD: Tensor,
    latent_pages: Tensor,
    indices_SK: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    d_v: int = LATENT_WIDTH,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """u_t = Attention(h_t, {c_s : s in S_t}), the second half of equation (2), in MQA mode: one entry of a token serves all heads.

    The key is the whole entry, the value its first d_v numbers. latent_pages (pages, 64, 656) uint8: an entry is the latent (512), then
    the rope dims (64), E = 576, d_v = 512, read into float32; or (pages, 64, E) plain. q (S, H, E) bfloat16, float16, float32 or float64.
    indices (S, K) int32 or int64: positions within the query's own sequence, -1 for an unused place. page_table (B, P), lengths (B) int32.
    Returns out (S, H, d_v) in q's dtype and lse (S, H) float32 (float64 for a float64 q), the natural log; zeros and -inf for a query that
    selects nothing. They are those of `sparse_attention` on the dequantized entries. No gradient.
    ValueError on mismatched shapes, other dtypes, and on the CPU pages outside [0, pages), lengths outside [0, T], or an index below -1 or
    past what its query sees; elsewhere such an index counts as unused.
    Sources: DeepSeek-V3.2-Exp report, section 2.1; the latent cache of the official demo's MLA; the layout of FlashMLA's sparse FP8 decode.
    """
    op = "sparse_attention_paged"
    E = checks.latent_pages(op, latent_pages)
    checks.queries(op, q_SHD, E, checks.QUERIES)
    if not 1 <= d_v <= E:
        raise ValueError(f"{op}: d_v must lie in [1, {E}], an entry's width, got {d_v}")
    if latent_pages.dtype == torch.uint8 and d_v != LATENT_WIDTH:
        raise ValueError(f"{op}: the value in quantized pages is the latent: d_v must be {LATENT_WIDTH}, got {d_v}")
    checks.page_table(op, q_SHD.shape[0], latent_pages, page_table, lengths)
    checks.indices(op, q_SHD.shape[0], indices_SK, lengths)
    return table.sparse_attention_paged(q_SHD, latent_pages, indices_SK, page_table, lengths, scale, d_v, backend)


def write_caches(
    latent: Tensor,
    k_rope: Tensor,
    k_I: Tensor,
    latent_pages: Tensor,
    index_pages: Tensor,
    slots: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Writes N tokens into both caches, in place: page[slot] = [e4m3(latent), scales, rope] and e4m3(H k_I / sqrt(D)), scale.

    latent (N, L), k_rope (N, R), already rotated by position, and k_I (N, D), floating. slots (N) int32 or int64: physical page * 64 +
    place in the page; negative: this token is skipped, and may hold anything. Every other byte of the pages stays as it was.
    latent_pages (pages, 64, 656) uint8 with L = 512, R = 64, scales powers of two; or (pages, 64, L + R) plain: the two beside each other.
    index_pages (pages, 8448) uint8 with D = 128: k_I is rotated by `quant.hadamard`, its scale a power of two; or (pages, 64, D) plain: k_I
    as it is, not rotated. Of two tokens with the same slot either may stay. No gradient.
    ValueError on mismatched shapes, other dtypes, on the CPU slots outside the pages, and for a NaN or an infinity that would have to be
    quantized, before anything is written; the Triton kernel skips such slots, and instead of raising stores a NaN as that block's scale.
    Sources: the caches and `act_quant` of the official demo; FlashMLA's and DeepGEMM's layouts, which `quant` describes.
    """
    checks.writes("write_caches", latent, k_rope, k_I, latent_pages, index_pages, slots)
    table.write_caches(latent, k_rope, k_I, latent_pages, index_pages, slots, backend)
