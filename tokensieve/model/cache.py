"""The cache of a generating model: per token one entry and one index key in every layer.

The entry of MLA is the latent and the rope dims, nothing per head.

Legend: B rows, S new tokens a row, N = B * S, T cached tokens, W numbers of a token's entry, D index width.
"""

from torch import Tensor
from transformers import Cache

from tokensieve.families import Entry
from tokensieve.model.entries import ContiguousKeys, Entries, IndexKeys
from tokensieve.model.pack import Pack
from tokensieve.ops import KEY_PAD

STEP = 256  # capacity grows to multiples of this, in tokens


class LatentCache(Cache):
    """Contiguous buffers that double when full.

    Layers append in order; `get_seq_length` counts the tokens of whole forward passes. A stored entry is final:
    rotated, normalized and in the model's dtype. `reserve`: tokens to allocate at once if the length is known.
    """

    def __init__(self, reserve: int = 0):
        self.reserve = reserve
        self.layers: list = []  # transformers' own cache layers: none, though generation and repr look for them
        self.entries_BTW: list[Tensor] = []
        self.index_BTD: list[Tensor | None] = []
        self.row_starts: Tensor | None = None  # (B, 1) int32, set when rows begin late (left padding, packed documents)
        self._length = 0
        self._capacity = 0

    # what the model calls

    def room_for(self, tokens: int) -> int:
        """Capacity in tokens after growing for `tokens` more, and for those past the end that index products read."""
        needed = max(self._length + tokens, self.reserve) + KEY_PAD
        if needed > self._capacity:
            self._capacity = -(-max(needed, 2 * self._capacity) // STEP) * STEP
        return self._capacity

    def append(
        self, layer: int, pack: Pack, entry: Entry, entries_NW: Tensor, index_keys: IndexKeys | None, backend: str
    ) -> ContiguousKeys:
        """Stores one layer's entries of this pass, and index keys as the indexer rounds them.

        Returns the keys of the whole buffers.
        """
        rows = pack.batch, pack.length
        index_BSD = None if index_keys is None else index_keys(True).detach().unflatten(0, rows)
        entries, index = self.store(layer, entries_NW.unflatten(0, rows), index_BSD)
        entries_TW = entries.flatten(0, 1)
        if pack.batch == 1:  # without the empty room, of which keys and values per head would be made too
            entries_TW = entries_TW[: self._length + pack.length]
        keys = None if index is None else lambda: (index.flatten(0, 1), None)
        return ContiguousKeys(pack, entry, entries_TW, keys, backend)

    def store(self, layer: int, entries_BSW: Tensor, index_BSD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Stores S tokens a row of one layer. Returns the whole buffers (B, capacity, W) and (B, capacity, D).

        ValueError if B is not the cache's.
        """
        a, b = self._length, self._length + entries_BSW.shape[1]
        if layer == len(self.entries_BTW):
            self.entries_BTW.append(self._buffer(entries_BSW))
            self.index_BTD.append(None if index_BSD is None else self._buffer(index_BSD))
        if self.entries_BTW[layer].shape[1] < self._capacity:
            self.entries_BTW[layer] = self._grown(self.entries_BTW[layer])
            old_index = self.index_BTD[layer]
            self.index_BTD[layer] = None if old_index is None else self._grown(old_index)
        entries, index = self.entries_BTW[layer], self.index_BTD[layer]
        if entries.shape[0] != entries_BSW.shape[0]:
            raise ValueError(
                f"the cache holds {entries.shape[0]} rows and the input {entries_BSW.shape[0]}; start a new cache"
            )
        entries[:, a:b] = entries_BSW
        if index is not None and index_BSD is not None:
            index[:, a:b] = index_BSD
        return entries, index

    def advance(self, tokens: int) -> None:
        """Counts the new tokens. The model calls it once, after all layers of a pass have appended."""
        self._length += tokens

    def _buffer(self, like_BSX: Tensor) -> Tensor:
        return like_BSX.new_zeros(like_BSX.shape[0], self._capacity, like_BSX.shape[2])

    def _grown(self, old_BTX: Tensor) -> Tensor:
        buffer = self._buffer(old_BTX)
        buffer[:, : self._length] = old_BTX[:, : self._length]
        return buffer

    # what transformers' generation calls

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def crop(self, max_length: int) -> None:
        """Forgets everything after the first `max_length` tokens; a negative number drops that many, and 0 drops none.

        (transformers' assisted generation drops -n tokens, and n may be 0; `reset` forgets everything.)
        ValueError if the new end is before the beginning of a row's last document, or in its padding.
        """
        length = max(0, self._length + max_length) if max_length <= 0 else min(self._length, max_length)
        if length == 0:
            self.row_starts = None
        elif self.row_starts is not None and length < self._length and int(self.row_starts.max()) >= length:
            raise ValueError(
                f"cannot crop to {length} tokens: a row begins at {int(self.row_starts.max())}; start a new cache"
            )
        self._length = length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices])

    def reset(self) -> None:
        self._length, self.row_starts = 0, None

    def _each(self, change) -> None:
        self.entries_BTW = [change(x) for x in self.entries_BTW]
        self.index_BTD = [None if x is None else change(x) for x in self.index_BTD]
        self.row_starts = None if self.row_starts is None else change(self.row_starts)

    def __len__(self) -> int:
        return len(self.entries_BTW)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return bool(self.entries_BTW)

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * max(1, len(self.entries_BTW))

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(x.nbytes for x in self.entries_BTW) + sum(x.nbytes for x in self.index_BTD if x is not None)


class Cached(Entries):
    """Entries of one pass on a `LatentCache`."""

    def __init__(self, cache: LatentCache, pack: Pack, entry: Entry, backend: str):
        self._cache, self._pack, self._entry, self._backend = cache, pack, entry, backend

    def append(self, layer: int, entries_NW: Tensor, index_keys: IndexKeys | None) -> ContiguousKeys:
        return self._cache.append(layer, self._pack, self._entry, entries_NW, index_keys, self._backend)
