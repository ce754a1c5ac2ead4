"""Entries, which attention reads: ONE contract for those of a pass, and its implementations.

A layer appends the entries and index keys of its new tokens, and gets the keys that they may see. Each implementation
decides where both lie:

- `Fresh`: no key is there before the pass and none is kept; for training, and for whole prompts without a cache.
- `Cached` (cache.py): the contiguous buffers of a generating model's `LatentCache`.
- `PagedChunk`: a chunk of one prompt, on the engine's pages.
- `PagedStep`: one new token of every sequence, on the engine's pages;
- `Gathered` (gathered.py): as `Fresh`, for a pass whose tokens several ranks share.

All but `PagedStep`, which returns `PagedKeys`, return `ContiguousKeys`. Both compute the same things: index scores, a
selection, attention mass, and attention to selected keys.

Legend: N query tokens, T keys, B sequences, S tokens a sequence, P pages that a row of the page table names, G
key-value groups, E entry width, W = G * E numbers of a token, D index width, H heads, K selected keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tokensieve import ops
from tokensieve.families import Entry
from tokensieve.model.pack import Pack
from tokensieve.model.rope import Rows, taken
from tokensieve.ops import quant
from tokensieve.ops.quant import PAGE_TOKENS

INDEX_ROOM = 3  # pages behind a sequence's last one, which the products of index keys may read

IndexKeys = Callable[[bool], Tensor]
"""Makes the new tokens' index keys (N, D). Argument: whether to round them to `index_dtype`, unless the store does."""


class Keys(Protocol):
    """The keys of one layer that a pass may see.

    `rows` picks some of its queries, or all (None). Indices are positions within [starts, ends).
    """

    starts_N: Tensor  # int32, first key of each query
    ends_N: Tensor  # int32, one past the last
    entry: Entry
    quantized_index: bool  # index keys are E4M3, so index queries have to be E4M3 too

    def columns(self, k: int) -> int:
        """Columns of a selection of at most k keys per query."""

    def all_within(self, k: int) -> bool:
        """Whether no query sees more than k keys, so that selecting k of them is attending to all."""

    def index_scores(self, q_NHD: Tensor, w_NH: Tensor, rows: Rows) -> Tensor:
        """Equation (1): (rows, T) float32, unspecified outside a query's range. q and w belong to `rows`."""

    def index_topk(self, q_NHD: Tensor, w_NH: Tensor, k: int, rows: Rows) -> Tensor:
        """Equations (1) and (2): (rows, k) int32, ascending, then -1. q and w belong to `rows`."""

    def index_topk_blocks(self, q_NHD: Tensor, w_NH: Tensor, k: int, block: int, blocks: int, rows: Rows) -> Tensor:
        """As `index_topk`, in two levels: `tokensieve.ops.index_topk_blocks`."""

    def select(self, scores_NT: Tensor, k: int, rows: Rows) -> Tensor:
        """The k keys with the largest scores: (rows, k) int32, ascending, then -1. The scores belong to `rows`."""

    def head_mass(self, q_NHD: Tensor, scale: float, rows: Rows) -> Tensor:
        """Mean over heads of dense attention's probabilities: (rows, T), 0 outside a range. q belongs to `rows`."""

    def gather(self, q_NHD: Tensor, indices_NK: Tensor | None, scale: float) -> Tensor:
        """Attention (N, H, d_v) of queries in the entries' form to the selected entries. None: to all visible ones."""


class Entries(Protocol):
    """A store for the entries of a pass."""

    def append(self, layer: int, entries_NW: Tensor, index_keys: IndexKeys | None) -> Keys:
        """Stores the new tokens' entries. Returns the keys that they may see, their own included.

        index_keys: None without an indexer.
        """

    def gather(self, x_NW: Tensor) -> Tensor:
        """Numbers (T, W) of all new tokens of the pass, in the order of the keys: x itself, unless ranks share it."""
        return x_NW


class ContiguousKeys:
    """Keys side by side on the pack's key axis."""

    def __init__(
        self,
        pack: Pack,
        entry: Entry,
        entries: Tensor | Callable[[], Tensor],
        index_keys: Callable[[], tuple[Tensor, Tensor | None]] | None,
        backend: str,
        quantized_index: bool = False,
    ):
        """entries: (T, W), or a function that returns them.

        index_keys: returns keys (T, D) and, if they are E4M3 (`quantized_index`), their scales (T). It is called when
        the keys are first needed.
        """
        self.pack, self.entry, self.backend, self.quantized_index = pack, entry, backend, quantized_index
        self.starts_N, self.ends_N = pack.starts_N, pack.ends_N
        self._entries, self._index_keys = entries, index_keys

    @property
    def entries_TW(self) -> Tensor:
        return self._entries if isinstance(self._entries, Tensor) else self._entries()

    @property
    def entries_TGE(self) -> Tensor:
        return self.entries_TW.view(self.entries_TW.shape[0], self.entry.groups, self.entry.width)

    @property
    def keys_TGD(self) -> Tensor:
        return self.entries_TGE[..., : self.entry.d_k]

    @property
    def values_TGV(self) -> Tensor:
        return self.entries_TGE[..., self.entry.v_start : self.entry.v_start + self.entry.d_v]

    @cached_property
    def index(self) -> tuple[Tensor, Tensor | None]:
        """Index keys (T, D), and their scales (T) float32 if they are E4M3."""
        assert self._index_keys is not None
        return self._index_keys()

    def columns(self, k: int) -> int:
        return min(k, self.pack.max_keys)

    def all_within(self, k: int) -> bool:
        return self.pack.max_keys <= k

    def _ranges(self, rows: Rows) -> tuple[Tensor, Tensor]:
        return taken(self.starts_N, rows), taken(self.ends_N, rows)

    def index_scores(self, q_NHD: Tensor, w_NH: Tensor, rows: Rows) -> Tensor:
        k, k_scale = self.index
        return ops.index_scores(q_NHD, k, w_NH, *self._ranges(rows), k_scale, backend=self.backend)

    def index_topk(self, q_NHD: Tensor, w_NH: Tensor, k: int, rows: Rows) -> Tensor:
        keys, k_scale = self.index
        return ops.index_topk(q_NHD, keys, w_NH, k, *self._ranges(rows), k_scale, backend=self.backend)

    def index_topk_blocks(self, q_NHD: Tensor, w_NH: Tensor, k: int, block: int, blocks: int, rows: Rows) -> Tensor:
        keys, k_scale = self.index
        return ops.index_topk_blocks(
            q_NHD, keys, w_NH, k, *self._ranges(rows), k_scale, block=block, blocks=blocks, backend=self.backend
        )

    def select(self, scores_NT: Tensor, k: int, rows: Rows) -> Tensor:
        return ops.select_topk(scores_NT, k, *self._ranges(rows), backend=self.backend)

    def head_mass(self, q_NHD: Tensor, scale: float, rows: Rows) -> Tensor:
        return ops.head_mass(q_NHD, self.keys_TGD, *self._ranges(rows), scale)

    def gather(self, q_NHD: Tensor, indices_NK: Tensor | None, scale: float) -> Tensor:
        if indices_NK is None:
            ranges = self.starts_N, self.ends_N
            return ops.dense_attention(q_NHD, self.keys_TGD, self.values_TGV, *ranges, scale, backend=self.backend)[0]
        _, _, d_k, v_start, d_v = self.entry
        return ops.sparse_attention(
            q_NHD, self.entries_TGE, indices_NK, scale, d_k, v_start, d_v, backend=self.backend
        )[0]


@dataclass(frozen=True)
class Fresh(Entries):
    """Entries of a pass that sees no earlier keys and keeps none of its own."""

    pack: Pack
    entry: Entry
    backend: str

    def append(self, layer: int, entries_NW: Tensor, index_keys: IndexKeys | None) -> ContiguousKeys:
        keys = None if index_keys is None else lambda: (index_keys(True), None)
        return ContiguousKeys(self.pack, self.entry, entries_NW, keys, self.backend)


# on pages


@dataclass(frozen=True)
class Pools:
    """All pages of all layers, as `tokensieve.ops.paged` describes them.

    The index pages of a layer without an indexer have no width.
    """

    entries: tuple[Tensor, ...]
    index: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (*self.entries, *self.index))

    def write(self, layer: int, entry: Entry, entries_NW: Tensor, k_ND: Tensor | None, slots_N: Tensor) -> None:
        """Stores the new tokens of one layer. Quantized pages take index keys before their Hadamard rotation."""
        pages, index = self.entries[layer], self.index[layer]
        keys = entries_NW[:, :0] if k_ND is None else k_ND
        if entry.groups > 1 or pages.dim() == 4:
            entries_NGE = entries_NW.view(-1, entry.groups, entry.width)
            first, second = entries_NGE[..., : entry.d_k], entries_NGE[..., entry.d_k :]
        else:  # plain pages hold the two parts of an entry side by side, so any cut is right
            cut = quant.LATENT_WIDTH if pages.dtype == torch.uint8 else entry.width // 2
            first, second = entries_NW[:, :cut], entries_NW[:, cut:]
        ops.write_caches(first, second, keys, pages, index, slots_N)


def unpacked(pages: Tensor, dtype: torch.dtype) -> Tensor:
    """Entries of pages as numbers: those of quantized pages in `dtype`, others as they are."""
    return torch.cat(quant.unpack_latent_page(pages, dtype), -1) if pages.dtype == torch.uint8 else pages


def stored_index(pages: Tensor, tokens: int) -> tuple[Tensor, Tensor | None]:
    """The index keys (T, D) of `tokens` tokens on these pages, and their scales (T) if the pages are quantized."""
    if pages.dtype != torch.uint8:
        return pages.flatten(0, 1)[:tokens], None
    values, scales = quant.unpack_index_page(pages)
    return values.flatten(0, 1)[:tokens], scales.flatten()[:tokens]


@dataclass(frozen=True)
class PagedSequence:
    """The tokens of one sequence in the pools."""

    length: int  # tokens
    pages: Tensor  # (P) int32, in order
    first: int | None  # the first page, if they are consecutive; then they are read in place

    @classmethod
    def of(cls, pages_P: Any, length: int) -> "PagedSequence":
        consecutive = length > 0 and int(pages_P[-1]) - int(pages_P[0]) == len(pages_P) - 1
        consecutive = consecutive and bool((pages_P[1:] - pages_P[:-1] == 1).all())
        return cls(length, torch.from_numpy(pages_P), int(pages_P[0]) if consecutive else None)

    def read(self, pool: Tensor, room: int = 0) -> Tensor:
        """Its pages of a pool, one behind the other, and `room` arbitrary ones: a view if they are consecutive."""
        if self.first is not None:
            return pool[self.first : self.first + len(self.pages) + room]
        return pool.index_select(0, F.pad(self.pages, (0, room)))

    def slots(self, positions: Tensor) -> Tensor:
        """Places in the flattened pool; -1 stays."""
        if self.first is not None:
            shift = self.first * PAGE_TOKENS
            return positions if shift == 0 else torch.where(positions < 0, -1, positions + shift)
        pages = self.pages[positions.clamp_min(0).long() // PAGE_TOKENS]
        return torch.where(positions < 0, -1, pages * PAGE_TOKENS + positions % PAGE_TOKENS)


class PagedChunk(Entries):
    """A chunk of one prompt. It writes to its own sequence's pages, and reads them gathered into contiguous keys."""

    def __init__(self, pools: Pools, table_P: Tensor, pack: Pack, entry: Entry, dtype: torch.dtype, backend: str):
        self._pools, self._table, self._pack, self._entry = pools, table_P, pack, entry
        self._tokens, self._dtype, self._backend = pack.max_keys, dtype, backend
        position = torch.arange(self._tokens - pack.length, self._tokens, device=table_P.device)
        self.slots = table_P[position // PAGE_TOKENS].long() * PAGE_TOKENS + position % PAGE_TOKENS

    def append(self, layer: int, entries_NW: Tensor, index_keys: IndexKeys | None) -> ContiguousKeys:
        """Stores entries and keys, and returns them as stored: rounded if the pages are quantized."""
        pages, index = self._pools.entries[layer], self._pools.index[layer]
        quantized = index.dtype == torch.uint8
        new_keys = None if index_keys is None else index_keys(not quantized)
        self._pools.write(layer, self._entry, entries_NW, new_keys, self.slots)
        entries = unpacked(pages.index_select(0, self._table), self._dtype)
        entries_TW = entries.flatten(0, 1)[: self._tokens].flatten(1)
        keys = None if index_keys is None else lambda: stored_index(index.index_select(0, self._table), self._tokens)
        return ContiguousKeys(self._pack, self._entry, entries_TW, keys, self._backend, quantized)


@dataclass(frozen=True, kw_only=True)
class PagedStep(Entries):
    """One new token of each of B sequences.

    lengths: tokens of each sequence, including the new one. slots: where its entry goes, page * 64 + place; negative
    for a padding row, whose length is 0. real: the first `real` rows are tokens, the others padding; None if unknown.
    """

    pools: Pools
    entry: Entry
    page_table: Tensor  # (B, P) int32
    lengths: Tensor  # (B) int32
    slots: Tensor  # (B) int32 or int64
    real: int | None
    backend: str

    @cached_property
    def starts(self) -> Tensor:
        return torch.zeros_like(self.lengths)

    @cached_property
    def sequences(self) -> "tuple[PagedSequence, ...]":
        """Where each row's tokens lie. Reads values, so only the CPU asks."""
        tables = self.page_table.numpy()
        return tuple(
            PagedSequence.of(tables[b, : -(-length // PAGE_TOKENS)], length)
            for b, length in enumerate(self.lengths.tolist())
        )

    @cached_property
    def everything(self) -> Tensor:
        """Every position of each sequence: (B, T) int32, ascending, then -1."""
        place = torch.arange(self.page_table.shape[1] * PAGE_TOKENS, dtype=torch.int32, device=self.lengths.device)
        return torch.where(place < self.lengths[:, None], place, -1)

    def append(self, layer: int, entries_NW: Tensor, index_keys: IndexKeys | None) -> "PagedKeys":
        keys = None if index_keys is None else index_keys(self.pools.index[layer].dtype != torch.uint8)
        real = slice(self.real)
        self.pools.write(layer, self.entry, entries_NW[real], None if keys is None else keys[real], self.slots[real])
        return PagedKeys(self, layer)


class PagedKeys:
    """Keys on their pages. Positions count from each sequence's beginning.

    On the CPU each sequence is read apart by the ops on contiguous keys, in place if its pages are consecutive. So its
    bits depend neither on the other sequences nor on where its pages lie. Quantized pages are read by the paged ops.
    """

    def __init__(self, step: PagedStep, layer: int):
        self.step, self.entry, self.backend = step, step.entry, step.backend
        self.starts_N, self.ends_N = step.starts, step.lengths
        self._entries, self._index = step.pools.entries[layer], step.pools.index[layer]
        self.quantized_index = self._index.dtype == torch.uint8
        self._apart = self._entries.is_cpu and torch.uint8 not in (self._entries.dtype, self._index.dtype)

    def columns(self, k: int) -> int:
        """k, or as many as there are in all pages: so a sequence's sums do not depend on how long the others are."""
        return min(k, len(self._entries) * PAGE_TOKENS)

    def all_within(self, k: int) -> bool:
        """Always False, since the answer would depend on the other sequences."""
        return False

    def index_scores(self, q_NHD: Tensor, w_NH: Tensor, rows: Rows) -> Tensor:
        table, lengths = taken(self.step.page_table, rows), taken(self.step.lengths, rows)
        return ops.index_scores_paged(q_NHD, self._index, w_NH, table, lengths, backend=self.backend)

    def index_topk(self, q_NHD: Tensor, w_NH: Tensor, k: int, rows: Rows) -> Tensor:
        if not self._apart:
            return self.select(self.index_scores(q_NHD, w_NH, rows), k, rows)
        numbers = range(len(q_NHD)) if rows is None else torch.arange(len(self.ends_N))[rows].tolist()
        indices_NK = torch.full((len(q_NHD), k), -1, dtype=torch.int32)
        for place, b in enumerate(numbers):
            sequence, one = self.step.sequences[b], slice(place, place + 1)
            if sequence.length:
                keys = sequence.read(self._index, INDEX_ROOM).flatten(0, 1)
                ranges = self.starts_N[b : b + 1], self.ends_N[b : b + 1]
                chosen_1K = ops.index_topk(q_NHD[one], keys, w_NH[one], k, *ranges, backend=self.backend)
                indices_NK[place] = chosen_1K[0]
        return indices_NK

    def index_topk_blocks(self, q_NHD: Tensor, w_NH: Tensor, k: int, block: int, blocks: int, rows: Rows) -> Tensor:
        """One sequence at a time with its index pages gathered, which saves nothing: block means are kept nowhere."""
        tables, lengths = taken(self.step.page_table, rows), taken(self.step.lengths, rows)
        indices_NK = torch.full((len(q_NHD), k), -1, dtype=torch.int32, device=q_NHD.device)
        for place, length in enumerate(lengths.tolist()):
            if length:
                pages = self._index.index_select(0, tables[place, : -(-length // PAGE_TOKENS)])
                (keys, scales), one, end = (
                    stored_index(pages, length),
                    slice(place, place + 1),
                    lengths[place : place + 1],
                )
                indices_NK[place] = ops.index_topk_blocks(
                    q_NHD[one], keys, w_NH[one], k, torch.zeros_like(end), end, scales,
                    block=block, blocks=blocks, backend=self.backend,
                )[0]  # fmt: skip
        return indices_NK

    def select(self, scores_NT: Tensor, k: int, rows: Rows) -> Tensor:
        return ops.select_topk(scores_NT, k, taken(self.starts_N, rows), taken(self.ends_N, rows), backend=self.backend)

    def head_mass(self, q_NHD: Tensor, scale: float, rows: Rows) -> Tensor:
        """As in `Keys`, one sequence at a time with its pages gathered, since only evaluation uses it."""
        tables, lengths = taken(self.step.page_table, rows), taken(self.step.lengths, rows)
        masses = []
        for b in range(len(q_NHD)):
            entries = unpacked(self._entries.index_select(0, tables[b].clamp(0, len(self._entries) - 1)), q_NHD.dtype)
            keys_TGD = entries.reshape(-1, self.entry.groups, self.entry.width)[..., : self.entry.d_k]
            length = lengths[b : b + 1]
            masses.append(ops.head_mass(q_NHD[b : b + 1], keys_TGD, torch.zeros_like(length), length, scale))
        return torch.cat(masses)

    def gather(self, q_NHD: Tensor, indices_NK: Tensor | None, scale: float) -> Tensor:
        real = slice(self.step.real)
        q = q_NHD[real]
        if self._apart:
            indices = [None] * len(q) if indices_NK is None else indices_NK.split(1)
            out = torch.cat([self._gather_alone(b, q[b : b + 1], indices[b], scale) for b in range(len(q))])
        else:
            indices_NK = (self.step.everything if indices_NK is None else indices_NK)[real]
            table, lengths = self.step.page_table[real], self.step.lengths[real]
            _, _, d_k, v_start, d_v = self.entry
            out, _ = ops.sparse_attention_paged(
                q,
                self._entries,
                indices_NK,
                table,
                lengths,
                scale,
                d_k=d_k,
                v_start=v_start,
                d_v=d_v,
                backend=self.backend,
            )
        return out if len(out) == len(q_NHD) else F.pad(out, (0, 0, 0, 0, 0, len(q_NHD) - len(out)))

    def _gather_alone(self, b: int, q_1HD: Tensor, indices_1K: Tensor | None, scale: float) -> Tensor:
        sequence, (groups, width, d_k, v_start, d_v) = self.step.sequences[b], self.entry
        if indices_1K is not None:
            pool_TGE, slots_1K = self._entries.view(-1, groups, width), sequence.slots(indices_1K)
            return ops.sparse_attention(q_1HD, pool_TGE, slots_1K, scale, d_k, v_start, d_v, backend=self.backend)[0]
        entries_TGE = sequence.read(self._entries).reshape(-1, groups, width)[: sequence.length]
        keys, values = entries_TGE[..., :d_k], entries_TGE[..., v_start : v_start + d_v]
        ranges = self.starts_N[b : b + 1], self.ends_N[b : b + 1]
        return ops.dense_attention(q_1HD, keys, values, *ranges, scale, backend=self.backend)[0]
