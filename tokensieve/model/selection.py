"""Who selects: the plug-in. A selection is a function from one layer's queries and keys to the positions that its attention may read.

Legend: N packed query tokens, T packed keys, H heads, G key groups, D key width, K selected.

The model's own is `indexer`, equation (2). The others are the controls that every evaluation puts beside it, and any callable of the same
form can take their place:

    def recent_and_first(c: SelectionContext) -> Tensor:        # (N, K) int32, ascending, then -1
        ...
    with tokensieve.selecting(model, recent_and_first): ...
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tokensieve import ops
from tokensieve.config import UserError
from tokensieve.model.pack import Pack

ROWS = 256  # queries whose full rows of scores or probabilities a control holds at a time


class Peers:
    """The ranks that hold the other heads of a model that is spread over several (`parallel.py`). Here there are none."""

    def select(self, queries: int, choose: Callable[[slice], Tensor]) -> Tensor:
        """(queries, K) indices, the same on all ranks: each chooses for some of the queries. choose: gives those of a slice of them."""
        return choose(slice(None))

    def all_heads(self, q_NHD: Tensor) -> Tensor:
        """The queries of every rank's heads."""
        return q_NHD


NO_PEERS = Peers()


@dataclass(frozen=True)
class SelectionContext:
    """What a selection may look at in one layer. Index inputs and attention inputs are computed when first asked for.

    index_inputs: takes a slice of the queries, all of them unless given.
    """

    layer: int
    k: int  # keys to select per query, at most
    pack: Pack
    index_inputs: Callable[..., tuple[Tensor, Tensor, Tensor]]
    attention_inputs: Callable[[], tuple[Tensor, Tensor, float]]
    backend: str = "auto"  # of the ops
    k_scale: Tensor | None = None  # (T) float32: of index keys that are E4M3, as their queries then are
    peers: Peers = NO_PEERS

    @cached_property
    def index(self) -> tuple[Tensor, Tensor, Tensor]:
        """q_I (N, H_I, d_I), k_I (T, d_I), w (N, H_I) of equation (1). UserError on a model without an indexer."""
        return self.index_inputs(slice(None))

    @cached_property
    def attention(self) -> tuple[Tensor, Tensor, float]:
        """q (N, H, D), k (T, G, D) and the softmax scale of the main attention."""
        return self.attention_inputs()

    def row_slices(self) -> Iterator[slice]:
        N = self.pack.starts_N.shape[0]
        return (slice(a, min(a + ROWS, N)) for a in range(0, N, ROWS))

    def scores(self, rows: slice = slice(None)) -> Tensor:
        """Index scores (rows, T) float32 of equation (1); outside a query's range unspecified."""
        q_I, k_I, w = self.index
        starts, ends = self.pack.starts_N[rows], self.pack.ends_N[rows]
        return ops.index_scores(q_I[rows], k_I, w[rows], starts, ends, self.k_scale, backend=self.backend)

    def head_mass(self, rows: slice = slice(None)) -> Tensor:
        """p (rows, T) float32: the mean over heads of the true attention's probabilities; 0 outside a query's range."""
        q, k, scale = self.attention
        return ops.head_mass(q[rows], k, self.pack.starts_N[rows], self.pack.ends_N[rows], scale)


Selection = Callable[[SelectionContext], Tensor | None]  # None: attend to every key


def indexer(c: SelectionContext) -> Tensor:
    """The k keys with the largest index score: equation (2)."""

    def choose(rows: slice) -> Tensor:
        q_I, k_I, w = c.index_inputs(rows)
        starts, ends = c.pack.starts_N[rows], c.pack.ends_N[rows]
        return ops.index_topk(q_I, k_I, w, c.k, starts, ends, c.k_scale, backend=c.backend)

    return c.peers.select(c.pack.starts_N.shape[0], choose)


def window(c: SelectionContext) -> Tensor:
    """The last k keys: what a sliding window of the same size would read."""
    starts, ends = c.pack.starts_N[:, None], c.pack.ends_N[:, None]
    position = torch.maximum(starts, ends - c.k) + torch.arange(c.k, device=starts.device, dtype=torch.int32)
    return torch.where(position < ends, position, -1).to(torch.int32)


def oracle(c: SelectionContext) -> Tensor:
    """The k keys to which the true attention gives most, heads summed: the best that any selection of this size can do."""

    def select(rows: slice) -> Tensor:
        return ops.select_topk(c.head_mass(rows), c.k, c.pack.starts_N[rows], c.pack.ends_N[rows], backend=c.backend)

    return torch.cat([select(rows) for rows in c.row_slices()])


def dense(c: SelectionContext) -> None:
    """No selection: the model attends to every key."""
    return None


SELECTIONS: dict[str, Selection] = {"indexer": indexer, "window": window, "oracle": oracle, "dense": dense}


def resolve(selection: str | Selection) -> Selection:
    if not isinstance(selection, str):
        return selection
    if selection not in SELECTIONS:
        raise UserError(f"selection {selection!r} is unknown; use one of {', '.join(SELECTIONS)} or a function")
    return SELECTIONS[selection]


@contextmanager
def selecting(model, selection: str | Selection, top_k: int | None = None) -> Iterator[None]:
    """Within the block `model` selects by `selection` (a name or a function), `top_k` keys per query if given."""
    before = model.selection, model.top_k
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}; the number of selected keys must be at least 1")
    model.selection = resolve(selection)
    model.top_k = top_k if top_k is not None else model.top_k
    try:
        yield
    finally:
        model.selection, model.top_k = before
