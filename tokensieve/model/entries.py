"""Entries, which attention reads: ONE contract for those of a pass, and its implementations.

A layer appends the entries and index keys of its new tokens, and gets the keys that they may see. Each implementation
decides where both lie:

- `Fresh`: no key is there before the pass and none is kept; for training, and for whole prompts without a cache.
- `Cached` (cache.py): the contiguous buffers of a generating model's `LatentCache`.
- `PagedChunk` (paged.py): a chunk of one prompt, or of each of several, on the engine's pages.
- `PagedStep` (paged.py): one new token of every sequence, on the engine's pages.
- `Gathered` (gathered.py): as `Fresh`, for a pass whose tokens several ranks share.

All but `PagedStep`, which returns `PagedKeys`, return `ContiguousKeys`. Both compute the same things: index scores, a
selection, attention mass, and attention to selected keys.

Legend: N query tokens, T keys, G key-value groups, E entry width, W = G * E numbers of a token, D index width, H heads,
K selected keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from tokensieve import ops
from tokensieve.families import Entry
from tokensieve.model.pack import Pack
from tokensieve.model.rope import Rows, taken

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
