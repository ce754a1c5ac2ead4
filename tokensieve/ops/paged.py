"""The ops of decoding, on caches in pages of 64 tokens; `tokensieve.ops` offers them with the others.

Legend: S query tokens, B sequences, n queries of a sequence, P pages that a row of the page table names, T = 64 * P tokens, H heads, K
places for selected keys, D index width, E entry width, L latent width, R rope width, N tokens to write.

S = B * n: queries [b * n, (b + 1) * n) are the last n tokens of sequence b, n = 1 in plain decoding, more when next tokens were drafted.
Query j of n sees the tokens [0, lens - n + 1 + j) of its sequence. `page_table` (B, P) int32 holds the physical page of each logical page;
entries past a sequence's last token are never read, and may be anything. `lens` (B) int32 counts each sequence's tokens, 0 <= lens <= T.
Sequences may share pages. Bytes of a page that no token of a sequence owns may be anything, NaN too.

Pages are quantized (uint8, the layouts of `quant.pack_latent_page` and `quant.pack_index_page`), or plain: (pages, 64, width) bfloat16,
float16 or float32, where the hardware has no FP8 or the widths differ. Values of tables, indices, slots and lens are checked on the CPU
only: elsewhere that would stop the queue. No op here has a gradient: inputs are detached.
"""

import numpy as np
import torch
from torch import Tensor

from tokensieve.ops import table
from tokensieve.ops.quant import (
    INDEX_PAGE_BYTES,
    INDEX_WIDTH,
    LATENT_TOKEN_BYTES,
    LATENT_WIDTH,
    PAGE_TOKENS,
    ROPE_WIDTH,
)
from tokensieve.ops.reference.paged import seen_tokens

PLAIN_PAGES = (torch.bfloat16, torch.float16, torch.float32)
QUERIES = (*PLAIN_PAGES, torch.float64)


def _readable(x: Tensor) -> bool:
    """Whether values can be looked at: it costs a synchronization on a GPU and cannot be traced."""
    return x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling()


def _index_width(op: str, index_pages: Tensor) -> int:
    if index_pages.dtype == torch.uint8:
        if index_pages.dim() != 2 or index_pages.shape[1] != INDEX_PAGE_BYTES:
            raise ValueError(
                f"{op}: quantized index_pages must be (pages, {INDEX_PAGE_BYTES}), got {tuple(index_pages.shape)}"
            )
        return INDEX_WIDTH
    return _plain_width(op, "index_pages", index_pages)


def _latent_width(op: str, latent_pages: Tensor) -> int:
    if latent_pages.dtype == torch.uint8:
        if latent_pages.dim() != 3 or latent_pages.shape[1:] != (PAGE_TOKENS, LATENT_TOKEN_BYTES):
            raise ValueError(
                f"{op}: quantized latent_pages must be (pages, {PAGE_TOKENS}, {LATENT_TOKEN_BYTES}), "
                f"got {tuple(latent_pages.shape)}"
            )
        return LATENT_WIDTH + ROPE_WIDTH
    return _plain_width(op, "latent_pages", latent_pages)


def _plain_width(op: str, name: str, pages: Tensor) -> int:
    if pages.dtype not in PLAIN_PAGES:
        raise ValueError(f"{op}: {name} must be uint8 (quantized), bfloat16, float16 or float32, got {pages.dtype}")
    if pages.dim() != 3 or pages.shape[1] != PAGE_TOKENS:
        raise ValueError(f"{op}: {name} must be (pages, {PAGE_TOKENS}, width), got {tuple(pages.shape)}")
    return pages.shape[2]


def _check_queries(op: str, q_SHD: Tensor, width: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if q_SHD.dim() != 3 or q_SHD.shape[2] != width:
        raise ValueError(f"{op}: q must be (S, H, {width}), as wide as what the pages hold, got {tuple(q_SHD.shape)}")
    if q_SHD.dtype not in dtypes:
        raise ValueError(f"{op}: q cannot be {q_SHD.dtype}, only {', '.join(map(str, dtypes))}")


def _check_table(op: str, S: int, pages: Tensor, page_table: Tensor, lens: Tensor) -> None:
    if page_table.dim() != 2 or lens.shape != page_table.shape[:1]:
        raise ValueError(
            f"{op}: page_table must be (B, P) and lens (B), got {tuple(page_table.shape)}, {tuple(lens.shape)}"
        )
    if page_table.dtype != torch.int32 or lens.dtype != torch.int32:
        raise ValueError(f"{op}: page_table and lens must be int32, got {page_table.dtype}, {lens.dtype}")
    B, P = page_table.shape
    if S % B if B else S:
        raise ValueError(f"{op}: {S} queries cannot be shared evenly by {B} sequences")
    if _readable(lens):
        counts = lens.numpy()  # as numpy's these few numbers take half the time, twice a layer in every step
        low, high = counts.min(), counts.max()
        if low < 0 or high > P * PAGE_TOKENS:
            raise ValueError(f"{op}: lens must lie in [0, {P * PAGE_TOKENS}] with {P} pages, got {low} to {high}")
        read = page_table.numpy()[np.arange(0, P * PAGE_TOKENS, PAGE_TOKENS) < counts[:, None]]
        if read.size and (read.min() < 0 or read.max() >= pages.shape[0]):
            raise ValueError(
                f"{op}: pages must lie in [0, {pages.shape[0]}), page_table has {read.min()} to {read.max()}"
            )


def _check_selection(op: str, S: int, indices_SK: Tensor, lens: Tensor) -> None:
    if indices_SK.dim() != 2 or indices_SK.shape[0] != S:
        raise ValueError(f"{op}: indices must be ({S}, K), got {tuple(indices_SK.shape)}")
    if indices_SK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: indices must be int32 or int64, got {indices_SK.dtype}")
    if _readable(indices_SK):
        if int(indices_SK.min()) < -1:
            raise ValueError(f"{op}: indices must be -1 or a position, got {int(indices_SK.min())}")
        seen_S, last_S = seen_tokens(lens, S), indices_SK.amax(1)
        unseen = (last_S >= seen_S).nonzero()
        if len(unseen):
            t = int(unseen[0])
            raise ValueError(
                f"{op}: query {t} sees {int(seen_S[t])} tokens, but indices has the position {int(last_S[t])}"
            )


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
    _check_queries(op, q_SHD, INDEX_WIDTH, QUERIES)
    if w_SH.shape != q_SHD.shape[:2] or not w_SH.is_floating_point():
        raise ValueError(f"{op}: w must be (S, H_I) = {tuple(q_SHD.shape[:2])} floating, got {tuple(w_SH.shape)}")
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: give both of cos and sin, or none")
    for turn in () if cos is None or sin is None else (cos, sin):
        R = turn.shape[-1]
        if turn.shape != (q_SHD.shape[0], 1, R) or R % 2 or R > INDEX_WIDTH or turn.dtype != torch.float32:
            raise ValueError(f"{op}: cos and sin must be ({q_SHD.shape[0]}, 1, R) float32, got {tuple(turn.shape)}")
    return table.quantize_queries(q_SHD, w_SH, cos, sin, backend)


def index_scores_paged(
    q_SHD: Tensor, index_pages: Tensor, w_SH: Tensor, page_table: Tensor, lens: Tensor, *, backend: str = "auto"
) -> Tensor:
    """I[t,s] = k_scale[s] * sum_j w[t,j] * relu(q[t,j] . k[s]): equation (1), s over the tokens of the query's own sequence.

    q (S, H_I, D) floating or float8_e4m3fn, used as it is given: for quantized keys the caller rotated it by `quant.hadamard`, quantized it
    and folded its scale into w. w (S, H_I) floating, with every scale of the query folded in. index_pages (pages, 8448) uint8, D = 128, the
    key's scale multiplying the score; or (pages, 64, D) plain, without a scale. page_table (B, P) and lens (B) int32.
    Returns (S, T) float32 (float64 for a float64 q), T = 64 * P; past what a query sees unspecified. The bits are
    those of `index_scores` on the same keys and scales: prefill and decode select alike. No gradient.
    ValueError on mismatched shapes, other dtypes, and on the CPU pages outside [0, pages) or lens outside [0, T].
    Sources: DeepSeek-V3.2-Exp report, equation (1); the official demo's key cache; the layout of DeepGEMM's paged MQA logits.
    """
    op = "index_scores_paged"
    _check_queries(op, q_SHD, _index_width(op, index_pages), (torch.float8_e4m3fn, *QUERIES))
    if w_SH.shape != q_SHD.shape[:2] or not w_SH.is_floating_point():
        raise ValueError(
            f"{op}: w must be (S, H_I) = {tuple(q_SHD.shape[:2])} floating, got {tuple(w_SH.shape)} {w_SH.dtype}"
        )
    _check_table(op, q_SHD.shape[0], index_pages, page_table, lens)
    return table.index_scores_paged(q_SHD, index_pages, w_SH, page_table, lens, backend)


def sparse_attention_paged(
    q_SHD: Tensor,
    latent_pages: Tensor,
    indices_SK: Tensor,
    page_table: Tensor,
    lens: Tensor,
    scale: float,
    *,
    d_v: int = LATENT_WIDTH,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """u_t = Attention(h_t, {c_s : s in S_t}), the second half of equation (2), in MQA mode: one entry of a token serves all heads.

    The key is the whole entry, the value its first d_v numbers. latent_pages (pages, 64, 656) uint8: an entry is the latent (512), then
    the rope dims (64), E = 576, d_v = 512, read into float32; or (pages, 64, E) plain. q (S, H, E) bfloat16, float16, float32 or float64.
    indices (S, K) int32 or int64: positions within the query's own sequence, -1 for an unused place. page_table (B, P), lens (B) int32.
    Returns out (S, H, d_v) in q's dtype and lse (S, H) float32 (float64 for a float64 q), the natural log; zeros and -inf for a query that
    selects nothing. They are those of `sparse_attention` on the dequantized entries. No gradient.
    ValueError on mismatched shapes, other dtypes, and on the CPU pages outside [0, pages), lens outside [0, T], or an index below -1 or
    past what its query sees; elsewhere such an index counts as unused.
    Sources: DeepSeek-V3.2-Exp report, section 2.1; the latent cache of the official demo's MLA; the layout of FlashMLA's sparse FP8 decode.
    """
    op = "sparse_attention_paged"
    E = _latent_width(op, latent_pages)
    _check_queries(op, q_SHD, E, QUERIES)
    if not 1 <= d_v <= E:
        raise ValueError(f"{op}: d_v must lie in [1, {E}], an entry's width, got {d_v}")
    if latent_pages.dtype == torch.uint8 and d_v != LATENT_WIDTH:
        raise ValueError(f"{op}: the value in quantized pages is the latent: d_v must be {LATENT_WIDTH}, got {d_v}")
    _check_table(op, q_SHD.shape[0], latent_pages, page_table, lens)
    _check_selection(op, q_SHD.shape[0], indices_SK, lens)
    return table.sparse_attention_paged(q_SHD, latent_pages, indices_SK, page_table, lens, scale, d_v, backend)


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
    op = "write_caches"
    E, D = _latent_width(op, latent_pages), _index_width(op, index_pages)
    if latent.dim() != 2 or k_rope.dim() != 2 or latent.shape[1] + k_rope.shape[1] != E:
        raise ValueError(
            f"{op}: latent (N, L) and k_rope (N, R) must fill an entry of width {E}, "
            f"got {tuple(latent.shape)}, {tuple(k_rope.shape)}"
        )
    if latent_pages.dtype == torch.uint8 and latent.shape[1] != LATENT_WIDTH:
        raise ValueError(f"{op}: quantized pages hold a latent of width {LATENT_WIDTH}, got {latent.shape[1]}")
    N = latent.shape[0]
    if k_rope.shape[0] != N or k_I.shape != (N, D):
        raise ValueError(
            f"{op}: latent has {N} tokens, so k_rope must be ({N}, R) and k_I ({N}, {D}), "
            f"got {tuple(k_rope.shape)}, {tuple(k_I.shape)}"
        )
    if not (latent.dtype in QUERIES and k_rope.dtype in QUERIES and k_I.dtype in QUERIES):
        raise ValueError(f"{op}: tokens cannot be {latent.dtype}, {k_rope.dtype}, {k_I.dtype}, only floating, not FP8")
    if latent_pages.shape[0] != index_pages.shape[0]:
        raise ValueError(
            f"{op}: a slot is the same place in both caches, but there are {latent_pages.shape[0]} latent_pages "
            f"and {index_pages.shape[0]} index_pages"
        )
    if slots.shape != (N,) or slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: slots must be ({N},) int32 or int64, got {tuple(slots.shape)} {slots.dtype}")
    places = latent_pages.shape[0] * PAGE_TOKENS
    if _readable(slots) and int(slots.max()) >= places:
        raise ValueError(f"{op}: slots must lie below {places} or be negative, got {int(slots.max())}")
    table.write_caches(latent, k_rope, k_I, latent_pages, index_pages, slots, backend)
