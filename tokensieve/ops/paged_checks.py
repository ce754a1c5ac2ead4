"""What the public ops on pages demand of their arguments, as `checks.py` has it for the others.

Legend: S query tokens, B sequences, P pages that a row of the page table names, H heads, G key-value groups, K places
for selected keys, E entry width, V value width, N tokens to write, L and R widths of an entry's two parts, D index
width.
"""

import numpy as np
import torch
from torch import Tensor

from tokensieve.ops.checks import INDEX_DTYPES, entry_parts, has_values, indices_shape, shared_heads
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


ENTRY_WIDTH = LATENT_WIDTH + ROPE_WIDTH  # on quantized pages


def index_pages(op: str, pages: Tensor) -> int:
    """Returns the width of an index key."""
    if pages.dtype == torch.uint8:
        if pages.dim() != 2 or pages.shape[1] != INDEX_PAGE_BYTES:
            raise ValueError(
                f"{op}: quantized index_pages must be (pages, {INDEX_PAGE_BYTES}), got {tuple(pages.shape)}"
            )
        return INDEX_WIDTH
    _plain_dtype(op, "index_pages", pages)
    if pages.dim() != 3 or pages.shape[1] != PAGE_TOKENS:
        raise ValueError(f"{op}: index_pages must be (pages, {PAGE_TOKENS}, width), got {tuple(pages.shape)}")
    return pages.shape[2]


def entry_pages(op: str, pages: Tensor) -> tuple[int, int]:
    """Returns the groups and the width of an entry."""
    if pages.dtype == torch.uint8:
        if pages.dim() != 3 or pages.shape[1:] != (PAGE_TOKENS, LATENT_TOKEN_BYTES):
            raise ValueError(
                f"{op}: quantized entry_pages must be (pages, {PAGE_TOKENS}, {LATENT_TOKEN_BYTES}), "
                f"got {tuple(pages.shape)}"
            )
        return 1, ENTRY_WIDTH
    _plain_dtype(op, "entry_pages", pages)
    if pages.dim() not in (3, 4) or pages.shape[1] != PAGE_TOKENS:
        raise ValueError(
            f"{op}: entry_pages must be (pages, {PAGE_TOKENS}, width) or (pages, {PAGE_TOKENS}, G, width), "
            f"got {tuple(pages.shape)}"
        )
    return pages.shape[2] if pages.dim() == 4 else 1, pages.shape[-1]


def _plain_dtype(op: str, name: str, pages: Tensor) -> None:
    if pages.dtype not in PLAIN_PAGES:
        raise ValueError(f"{op}: {name} must be uint8 (quantized), bfloat16, float16 or float32, got {pages.dtype}")


def queries(op: str, q_SHD: Tensor, width: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if q_SHD.dim() != 3 or q_SHD.shape[2] != width:
        raise ValueError(f"{op}: q must be (S, H, {width}), as wide as what the pages hold, got {tuple(q_SHD.shape)}")
    if q_SHD.dtype not in dtypes:
        raise ValueError(f"{op}: q cannot be {q_SHD.dtype}, only {', '.join(map(str, dtypes))}")


def entries(op: str, q_SHD: Tensor, pages: Tensor, d_k: int | None, v_start: int, d_v: int) -> int:
    """Returns the width of a key."""
    G, E = entry_pages(op, pages)
    d_k = E if d_k is None else d_k
    queries(op, q_SHD, d_k, QUERIES)
    entry_parts(op, q_SHD, E, d_k, v_start, d_v)
    shared_heads(op, q_SHD, G)
    if pages.dtype == torch.uint8 and (d_k, v_start, d_v) != (ENTRY_WIDTH, 0, LATENT_WIDTH):
        raise ValueError(
            f"{op}: on quantized pages the key is the entry and the value its latent: d_k must be {ENTRY_WIDTH}, "
            f"v_start must be 0 and d_v must be {LATENT_WIDTH}, got {d_k}, {v_start} and {d_v}"
        )
    return d_k


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
    op: str, first: Tensor, second: Tensor, k_I: Tensor, entry_pool: Tensor, index_pool: Tensor, slots: Tensor
) -> None:
    (G, E), D, N = entry_pages(op, entry_pool), index_pages(op, index_pool), first.shape[0]
    tokens = (N, G) if entry_pool.dim() == 4 else (N,)
    if first.shape[:-1] != tokens or second.shape[:-1] != tokens or first.shape[-1] + second.shape[-1] != E:
        raise ValueError(
            f"{op}: first ({', '.join(map(str, tokens))}, L) and second ({', '.join(map(str, tokens))}, R) must fill "
            f"entries of width {E}, got {tuple(first.shape)}, {tuple(second.shape)}"
        )
    if entry_pool.dtype == torch.uint8 and first.shape[-1] != LATENT_WIDTH:
        raise ValueError(f"{op}: quantized pages hold a latent of width {LATENT_WIDTH}, got {first.shape[-1]}")
    if k_I.shape != (N, D):
        raise ValueError(f"{op}: first has {N} tokens, so k_I must be ({N}, {D}), got {tuple(k_I.shape)}")
    if not (first.dtype in QUERIES and second.dtype in QUERIES and k_I.dtype in QUERIES):
        raise ValueError(f"{op}: tokens cannot be {first.dtype}, {second.dtype}, {k_I.dtype}, only floating, not FP8")
    pages = entry_pool.shape[0]
    if pages != index_pool.shape[0]:
        raise ValueError(
            f"{op}: a slot is the same place in both caches, but there are {pages} entry_pages "
            f"and {index_pool.shape[0]} index_pages"
        )
    if slots.shape != (N,) or slots.dtype not in INDEX_DTYPES:
        raise ValueError(f"{op}: slots must be ({N},) int32 or int64, got {tuple(slots.shape)} {slots.dtype}")
    if has_values(slots) and int(slots.max()) >= pages * PAGE_TOKENS:
        raise ValueError(f"{op}: slots must lie below {pages * PAGE_TOKENS} or be negative, got {int(slots.max())}")
