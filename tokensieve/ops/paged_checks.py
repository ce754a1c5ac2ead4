"""What the public ops on pages demand of their arguments, as `checks.py` has it for the others.

Legend: S query tokens, B sequences, P pages that a row of the page table names, H heads, K places for selected keys, N tokens to write.
"""

import numpy as np
import torch
from torch import Tensor

from tokensieve.ops.checks import INDEX_DTYPES, has_values, indices_shape
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


def index_pages(op: str, pages: Tensor) -> int:
    """Returns the width of an index key."""
    if pages.dtype == torch.uint8:
        if pages.dim() != 2 or pages.shape[1] != INDEX_PAGE_BYTES:
            raise ValueError(
                f"{op}: quantized index_pages must be (pages, {INDEX_PAGE_BYTES}), got {tuple(pages.shape)}"
            )
        return INDEX_WIDTH
    return _plain_pages(op, "index_pages", pages)


def latent_pages(op: str, pages: Tensor) -> int:
    """Returns the width of an entry."""
    if pages.dtype == torch.uint8:
        if pages.dim() != 3 or pages.shape[1:] != (PAGE_TOKENS, LATENT_TOKEN_BYTES):
            raise ValueError(
                f"{op}: quantized latent_pages must be (pages, {PAGE_TOKENS}, {LATENT_TOKEN_BYTES}), "
                f"got {tuple(pages.shape)}"
            )
        return LATENT_WIDTH + ROPE_WIDTH
    return _plain_pages(op, "latent_pages", pages)


def _plain_pages(op: str, name: str, pages: Tensor) -> int:
    if pages.dtype not in PLAIN_PAGES:
        raise ValueError(f"{op}: {name} must be uint8 (quantized), bfloat16, float16 or float32, got {pages.dtype}")
    if pages.dim() != 3 or pages.shape[1] != PAGE_TOKENS:
        raise ValueError(f"{op}: {name} must be (pages, {PAGE_TOKENS}, width), got {tuple(pages.shape)}")
    return pages.shape[2]


def queries(op: str, q_SHD: Tensor, width: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if q_SHD.dim() != 3 or q_SHD.shape[2] != width:
        raise ValueError(f"{op}: q must be (S, H, {width}), as wide as what the pages hold, got {tuple(q_SHD.shape)}")
    if q_SHD.dtype not in dtypes:
        raise ValueError(f"{op}: q cannot be {q_SHD.dtype}, only {', '.join(map(str, dtypes))}")


def head_weights(op: str, q_SHD: Tensor, w_SH: Tensor) -> None:
    if w_SH.shape != q_SHD.shape[:2] or not w_SH.is_floating_point():
        raise ValueError(
            f"{op}: w must be (S, H_I) = {tuple(q_SHD.shape[:2])} floating, got {tuple(w_SH.shape)} {w_SH.dtype}"
        )


def rotation_tables(op: str, q_SHD: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: give both of cos and sin, or none")
    for x in () if cos is None or sin is None else (cos, sin):
        S, R = q_SHD.shape[0], x.shape[-1]
        if x.shape != (S, 1, R) or R % 2 or R > INDEX_WIDTH or x.dtype != torch.float32:
            raise ValueError(f"{op}: cos and sin must be ({S}, 1, R) float32, got {tuple(x.shape)}")


def page_table(op: str, S: int, pages: Tensor, table: Tensor, lengths: Tensor) -> None:
    if table.dim() != 2 or lengths.shape != table.shape[:1]:
        raise ValueError(
            f"{op}: page_table must be (B, P) and lengths (B), got {tuple(table.shape)}, {tuple(lengths.shape)}"
        )
    if table.dtype != torch.int32 or lengths.dtype != torch.int32:
        raise ValueError(f"{op}: page_table and lengths must be int32, got {table.dtype}, {lengths.dtype}")
    B, P = table.shape
    if S % B if B else S:
        raise ValueError(f"{op}: {S} queries cannot be shared evenly by {B} sequences")
    if has_values(lengths):
        counts = lengths.numpy()  # as numpy's these few numbers take half the time, twice a layer in every step
        low, high = counts.min(), counts.max()
        if low < 0 or high > P * PAGE_TOKENS:
            raise ValueError(f"{op}: lengths must lie in [0, {P * PAGE_TOKENS}] with {P} pages, got {low} to {high}")
        read = table.numpy()[np.arange(0, P * PAGE_TOKENS, PAGE_TOKENS) < counts[:, None]]
        if read.size and (read.min() < 0 or read.max() >= pages.shape[0]):
            raise ValueError(
                f"{op}: pages must lie in [0, {pages.shape[0]}), page_table has {read.min()} to {read.max()}"
            )


def indices(op: str, S: int, indices_SK: Tensor, lengths: Tensor) -> None:
    indices_shape(op, S, indices_SK)
    if has_values(indices_SK):
        if int(indices_SK.min()) < -1:
            raise ValueError(f"{op}: indices must be -1 or a position, got {int(indices_SK.min())}")
        seen_S, last_S = seen_tokens(lengths, S), indices_SK.amax(1)
        unseen = (last_S >= seen_S).nonzero()
        if len(unseen):
            t = int(unseen[0])
            raise ValueError(
                f"{op}: query {t} sees {int(seen_S[t])} tokens, but indices has the position {int(last_S[t])}"
            )


def writes(
    op: str,
    latent: Tensor,
    k_rope: Tensor,
    k_I: Tensor,
    latent_pages_: Tensor,
    index_pages_: Tensor,
    slots: Tensor,
) -> None:
    E, D = latent_pages(op, latent_pages_), index_pages(op, index_pages_)
    if latent.dim() != 2 or k_rope.dim() != 2 or latent.shape[1] + k_rope.shape[1] != E:
        raise ValueError(
            f"{op}: latent (N, L) and k_rope (N, R) must fill an entry of width {E}, "
            f"got {tuple(latent.shape)}, {tuple(k_rope.shape)}"
        )
    if latent_pages_.dtype == torch.uint8 and latent.shape[1] != LATENT_WIDTH:
        raise ValueError(f"{op}: quantized pages hold a latent of width {LATENT_WIDTH}, got {latent.shape[1]}")
    N = latent.shape[0]
    if k_rope.shape[0] != N or k_I.shape != (N, D):
        raise ValueError(
            f"{op}: latent has {N} tokens, so k_rope must be ({N}, R) and k_I ({N}, {D}), "
            f"got {tuple(k_rope.shape)}, {tuple(k_I.shape)}"
        )
    if not (latent.dtype in QUERIES and k_rope.dtype in QUERIES and k_I.dtype in QUERIES):
        raise ValueError(f"{op}: tokens cannot be {latent.dtype}, {k_rope.dtype}, {k_I.dtype}, only floating, not FP8")
    pages = latent_pages_.shape[0]
    if pages != index_pages_.shape[0]:
        raise ValueError(
            f"{op}: a slot is the same place in both caches, but there are {pages} latent_pages "
            f"and {index_pages_.shape[0]} index_pages"
        )
    if slots.shape != (N,) or slots.dtype not in INDEX_DTYPES:
        raise ValueError(f"{op}: slots must be ({N},) int32 or int64, got {tuple(slots.shape)} {slots.dtype}")
    if has_values(slots) and int(slots.max()) >= pages * PAGE_TOKENS:
        raise ValueError(f"{op}: slots must lie below {pages * PAGE_TOKENS} or be negative, got {int(slots.max())}")
