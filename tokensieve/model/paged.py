"""Entries on the engine's pages: chunks of prompts, and one new token of every sequence.

The contract is in entries.py, the layout of the pages in `tokensieve.ops.paged`.

Legend: N query tokens, T keys, B sequences, P pages that a row of the page table names, G key-value groups, E entry
width, W = G * E numbers of a token, D index width, H heads, K selected keys.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokensieve import ops
from tokensieve.families import Entry
from tokensieve.model.entries import ContiguousKeys, Entries, IndexKeys
from tokensieve.model.pack import Pack
from tokensieve.model.rope import Rows, taken
from tokensieve.ops import quant
from tokensieve.ops.quant import PAGE_TOKENS

INDEX_ROOM = 3  # pages behind a sequence's last one, which the products of index keys may read


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
    """Chunks of prompts. Each writes to its own sequence's pages; all are read gathered into contiguous keys."""

    def __init__(
        self,
        pools: Pools,
        table_P: Tensor,
        places_T: Tensor | None,
        pack: Pack,
        entry: Entry,
        dtype: torch.dtype,
        backend: str,
    ):
        """table: the pages of every prompt, one prompt behind the other.

        places: where each key of the pass lies on these pages; None if they hold the keys of one prompt.
        """
        self._pools, self._table, self._places, self._pack, self._entry = pools, table_P, places_T, pack, entry
        self._dtype, self._backend = dtype, backend
        place = pack.ends_N.long() - 1
        place = place if places_T is None else places_T[place]
        self.slots = table_P[place // PAGE_TOKENS].long() * PAGE_TOKENS + place % PAGE_TOKENS

    def append(self, layer: int, entries_NW: Tensor, index_keys: IndexKeys | None) -> ContiguousKeys:
        """Stores entries and keys, and returns them as stored: rounded if the pages are quantized."""
        pages, index = self._pools.entries[layer], self._pools.index[layer]
        quantized = index.dtype == torch.uint8
        new_keys = None if index_keys is None else index_keys(not quantized)
        self._pools.write(layer, self._entry, entries_NW, new_keys, self.slots)
        entries = unpacked(pages.index_select(0, self._table), self._dtype)
        entries_TW = self._keys(entries.flatten(0, 1)).flatten(1)
        keys = None if index_keys is None else lambda: self._index(index.index_select(0, self._table))
        return ContiguousKeys(self._pack, self._entry, entries_TW, keys, self._backend, quantized)

    def _keys(self, stored: Tensor) -> Tensor:
        """Those of the pass among all tokens of the pages."""
        if self._places is None:
            return stored[: self._pack.row_keys]
        if stored.dtype == torch.float8_e4m3fn:  # which not every device's index_select takes
            return self._keys(stored.view(torch.uint8)).view(stored.dtype)
        return stored.index_select(0, self._places)

    def _index(self, pages: Tensor) -> tuple[Tensor, Tensor | None]:
        keys, scales = stored_index(pages, len(pages) * PAGE_TOKENS)
        return self._keys(keys), None if scales is None else self._keys(scales)


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
