"""Context parallelism: the ranks of a group share the tokens of a pass. Each has its own queries and gathers all keys.

A row is cut into short chunks, which are dealt to the R ranks in turn and back: of every 2R chunks rank r has the
chunks r and 2R - 1 - r. A query sees the tokens of its document before it. So each rank has about as much attention to
compute as any other, however long the documents are. What a token leaves behind in a layer is small: its entry, and its
index key. Both are gathered, and put into the order of the row. So every query reads the same keys in the same order as
in one process: its scores are the same numbers, and ties go to the same key. In the backward pass the gradients of
gathered numbers are summed over the ranks, and each rank gets those of its own tokens.

Legend: B rows, S tokens a row, R ranks of the group, C tokens of a chunk, N = B * S / R tokens of this rank, T = B * S
keys, W numbers of a token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.families import Entry
from tokensieve.model.entries import ContiguousKeys, Entries, IndexKeys
from tokensieve.model.pack import Pack
from tokensieve.model.selection import Once

# Short enough to balance packs of documents (docs/results/training.md), long enough for kernels that read the keys of
# neighbouring queries together.
CHUNK = 128

# The names of torch 2.13, and those from before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that share the tokens of a pass, seen from one of them.

    rank: index of this rank within the group. size: R. group: of torch.distributed. chunk: C is its largest divisor of
    which a row holds a multiple of 2R.
    """

    rank: int
    size: int
    group: Any
    chunk: int = CHUNK

    def own(self, x_BS: Tensor) -> Tensor:
        """This rank's tokens (B, S / R, ...) of whole rows (B, S, ...), in their order.

        UserError for a row that is not a multiple of 2R tokens.
        """
        turn, S = 2 * self.size, x_BS.shape[1]
        if not S or S % turn:
            raise UserError(
                f"a row of {S} tokens does not divide into {turn} chunks, which {self.size} ranks of a context need; "
                f"give rows of a multiple of {turn} tokens"
            )
        chunks = x_BS.unflatten(1, (-1, turn, math.gcd(S // turn, self.chunk)))
        return torch.stack((chunks[:, :, self.rank], chunks[:, :, turn - 1 - self.rank]), dim=2).flatten(1, 3)

    def own_queries(self, pack: Pack) -> Pack:
        """This rank's queries of a whole pass. Their key ranges stay those on the axis of all keys."""

        def own(x_T: Tensor) -> Tensor:
            return self.own(x_T.unflatten(0, (pack.batch, pack.length))).flatten(0, 1)

        return replace(
            pack,
            length=pack.length // self.size,
            positions_N=own(pack.positions_N),
            starts_N=own(pack.starts_N),
            ends_N=own(pack.ends_N),
            bounds=None,  # queries and keys are on different axes
            valid_N=None if pack.valid_N is None else own(pack.valid_N),
        )


class Gathered(Entries):
    """Entries of a pass whose tokens a group of ranks shares. It sees no earlier keys and keeps none of its own."""

    def __init__(self, context: ContextGroup, pack: Pack, entry: Entry, backend: str):
        """pack: of this rank's queries."""
        self._group, self._pack, self._entry, self._backend = context.group, pack, entry, backend
        row = torch.arange(pack.batch * pack.length * context.size, device=pack.positions_N.device)
        row = row.view(pack.batch, -1)
        ranks = [replace(context, rank=rank).own(row).flatten() for rank in range(context.size)]
        self.sent_T = torch.cat(ranks)  # place on the axis of the keys of what arrives, rank by rank
        self.arrived_T = torch.empty_like(self.sent_T)  # the inverse permutation
        self.arrived_T[self.sent_T] = torch.arange(len(self.sent_T), device=row.device)

    def append(self, layer: int, entries_NW: Tensor, index_keys: IndexKeys | None) -> ContiguousKeys:
        """The entries are on their way until they are read: selection, which reads index keys, runs meanwhile."""
        keys = None if index_keys is None else lambda: (index_keys(True), None)
        return ContiguousKeys(self._pack, self._entry, self._start(entries_NW), keys, self._backend)

    def gather(self, x_NW: Tensor) -> Tensor:
        return self._start(x_NW)()

    def _start(self, x_NW: Tensor) -> Callable[[], Tensor]:
        x = x_NW.detach().contiguous()
        parts_TW = x.new_empty(len(self.sent_T), *x.shape[1:])
        work = all_gather(parts_TW, x, self._group, async_op=True)

        def arrived() -> Tensor:
            work.wait()
            return _Arrived.apply(x_NW, parts_TW, self)

        return Once(arrived)

    def in_order(self, parts_TW: Tensor) -> Tensor:
        return parts_TW.index_select(0, self.arrived_T)

    def scatter(self, grad_TW: Tensor) -> Tensor:
        """The sum over ranks of the gradients of this rank's tokens."""
        parts = grad_TW.index_select(0, self.sent_T)
        own_NW = parts.new_empty(self._pack.batch * self._pack.length, *parts.shape[1:])
        reduce_scatter(own_NW, parts, group=self._group)
        return own_NW


class _Arrived(torch.autograd.Function):
    """Numbers of all ranks' tokens in the order of the keys, as they were gathered from each rank's x."""

    @staticmethod
    def forward(ctx, x_NW: Tensor, parts_TW: Tensor, entries: Gathered) -> Tensor:
        ctx.entries = entries
        return entries.in_order(parts_TW)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.entries.scatter(grads[0]), None, None
