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

FEWEST = 16  # queries of a block; smaller ones are left to the reference


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


def block(starts_S: np.ndarray, ends_S: np.ndarray) -> int:
    """C, the largest size of aligned blocks of which each has all of its tokens among the queries, or none.

    0 if the queries are not in the order of their keys, or see no key.
    """
    place = ends_S - 1
    if not len(place) or (np.diff(place) <= 0).any() or (starts_S > place).any():
        return 0
    edge = np.flatnonzero(np.diff(place) != 1)
    return math.gcd(int(place[0]), int(place[-1]) + 1, *place[edge + 1].tolist(), *(place[edge] + 1).tolist())


def why_not(starts_S: Tensor, ends_S: Tensor) -> str | None:
    """Why these queries are not blocks of a pack, in one clause, or None if they are. Waits for the device."""
    found = block(starts_S.cpu().numpy(), ends_S.cpu().numpy())
    return None if found >= FEWEST else "the queries are not blocks of a causal pack"


def levels(starts_S: Tensor, ends_S: Tensor, T: int) -> Iterator[Level]:
    """All pairs of a query and a key that it sees, each in one level. Waits for the device."""
    starts, place, device = starts_S.cpu().numpy(), ends_S.cpu().numpy() - 1, starts_S.device
    size = block(starts, place + 1)

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
