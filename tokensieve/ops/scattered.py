"""Dense attention of some of a pack's queries, in few calls of kernels that take whole segments of queries and keys.

Under context parallelism a rank has blocks of C queries, here and there on the axis of all T keys. Query t sees the
keys of its document up to itself. Such pairs are divided by levels. In level 0 the queries of a block see the keys of
their own block, causally. In level n, of every two neighbours among the stretches of 2^(n-1) C keys, the queries in the
second see all keys in the first that belong to their document. So every pair is in one level. In a level no two
segments have a query or a key in common, so a variable-length kernel takes all of them at once, and there are about
log2(T / C) levels. Their outputs are merged by their logsumexps.

Legend: S queries, T keys.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

FEWEST = 16  # queries of a block; smaller ones are left to the reference
# By `starts`, for as long as it lives: `ends`, what else the levels depend on, and the levels.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Level(NamedTuple):
    """Segments of queries and keys, one after another. A causal segment has the same tokens as both.

    rows, keys: places in q and in k, int64. query_bounds, key_bounds: cumulative lengths, int32.
    """

    rows: Tensor
    keys: Tensor
    query_bounds: Tensor
    key_bounds: Tensor
    longest_query: int
    longest_key: int
    causal: bool


def block(starts_S: np.ndarray, ends_S: np.ndarray, T: int) -> int:
    """C, the largest size of aligned blocks of which each has all of its tokens among the queries, or none.

    0 if the queries are not of a pack on T keys: in the order of their keys, seeing themselves and, of what is before
    them, all of their document or, if they begin it, nothing.
    """
    place = ends_S - 1
    if not len(place) or (np.diff(place) <= 0).any() or (starts_S > place).any():
        return 0
    if place[-1] >= T or (starts_S < 0).any():
        return 0
    if ((np.diff(starts_S) != 0) & (starts_S[1:] <= place[:-1])).any():  # another document that is not all behind
        return 0
    edge = np.flatnonzero(np.diff(place) != 1)
    return math.gcd(int(place[0]), int(place[-1]) + 1, *place[edge + 1].tolist(), *(place[edge] + 1).tolist())


def levels(starts_S: Tensor, ends_S: Tensor, T: int) -> tuple[Level, ...] | None:
    """All pairs of a query and a key that it sees, each in one level; None if the queries are not blocks of a pack.

    Waits for the device, but only once for the two tensors of a pack, which every layer hands over in both directions.
    What PyTorch keeps no count of changes of, made in inference mode, is looked at anew every time.
    """
    if starts_S.is_inference() or ends_S.is_inference():
        return _divided(starts_S, ends_S, T)
    state = T, starts_S._version, ends_S._version
    known = _known.get(starts_S)
    if known is None or known[0]() is not ends_S or known[1] != state:
        _known[starts_S] = known = TensorWeakRef(ends_S), state, _divided(starts_S, ends_S, T)
    return known[2]


def _divided(starts_S: Tensor, ends_S: Tensor, T: int) -> tuple[Level, ...] | None:
    starts, ends = starts_S.cpu().numpy(), ends_S.cpu().numpy()
    size = block(starts, ends, T)
    return tuple(_levels(starts, ends - 1, size, T, starts_S.device)) if size >= FEWEST else None


def _levels(starts: np.ndarray, place: np.ndarray, size: int, T: int, device: torch.device) -> Iterator[Level]:
    """size: of blocks. place: of each query on the axis of keys."""

    def level(rows: np.ndarray, first: np.ndarray, begin: np.ndarray, end: np.ndarray, causal: bool) -> Level:
        """first: of each segment, among the rows. begin, end: of its keys."""
        lengths = end - begin
        edges = np.concatenate(([0], np.cumsum(lengths)))
        keys = np.arange(edges[-1]) + np.repeat(begin - edges[:-1], lengths)
        queries = np.append(first, len(rows))
        arrays = rows, keys, queries.astype("int32"), edges.astype("int32")
        placed, seen, query_bounds, key_bounds = (torch.from_numpy(x).to(device) for x in arrays)
        longest = int(np.diff(queries).max()), int(lengths.max())
        return Level(placed, seen, query_bounds, key_bounds, *longest, causal)

    def firsts(*what: np.ndarray) -> np.ndarray:
        return np.flatnonzero(np.any([np.diff(x, prepend=-1) != 0 for x in what], axis=0))

    first = firsts(place // size, starts)
    last = np.append(first[1:], len(place)) - 1
    yield level(np.arange(len(place)), first, place[first], place[last] + 1, True)
    while size < T:
        half = place // size
        rows = np.flatnonzero((half % 2 == 1) & (starts < half * size))
        if len(rows):
            first = firsts(half[rows])
            middle = half[rows[first]] * size
            yield level(rows, first, np.maximum(starts[rows[first]], middle - size), middle, False)
        size *= 2
