"""Dense attention where it pays: in named layers, in short contexts, or where attention is spread.

Legend: N queries, T keys, K selected keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.model.selection import SelectionContext, window
from tokensieve.selectors.layers import names_layer
from tokensieve.selectors.shares import best_shares, stacked, stacked_pair


@dataclass(frozen=True)
class DenseLayers:
    """The top k, but attention to every key in `layers`. UserError for none, and for a number below 0."""

    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 0:
            raise UserError(f"DenseLayers(layers={list(self.layers)}): name at least one layer; the first is layer 0")

    def __call__(self, c: SelectionContext) -> Tensor | None:
        return None if names_layer(self, c) else c.topk()


@dataclass(frozen=True)
class DenseBelow:
    """Every key for a query that sees at most `tokens` of them, the top k for all others.

    A request that never grows past `tokens` is answered by the dense model.
    """

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"DenseBelow({self.tokens}): give at least 1 token; up to k every query reads all its keys")

    def __call__(self, c: SelectionContext) -> Tensor:
        if self.tokens <= c.k:
            return c.topk()
        few = (c.ends_N - c.starts_N <= self.tokens)[:, None]
        every, best = stacked_pair(window(c, c.keys.columns(self.tokens)), c.topk())
        return torch.where(few, every, best)


@dataclass(frozen=True)
class DenseIfSpread:
    """The top k if these keys hold at least `mass` of the index scores' softmax; else every key that the query sees.

    UserError if ranks divide the model.
    """

    mass: float

    def __post_init__(self) -> None:
        if not 0 < self.mass < 1:
            raise UserError(f"DenseIfSpread({self.mass}): the mass is a share between 0 and 1")

    def __call__(self, c: SelectionContext) -> Tensor:
        if c.divided:
            raise UserError("DenseIfSpread reads as many keys as values say, which ranks cannot exchange; use one rank")
        return stacked([self._of_block(block) for block in c.blocks()])

    def _of_block(self, c: SelectionContext) -> Tensor:
        best, shares = best_shares(c, c.k)
        spread = (shares.sum(1) < self.mass) & (c.ends_N - c.starts_N > c.k)
        if not bool(spread.any()):
            return best
        width = int((c.ends_N - c.starts_N).masked_fill(~spread, 0).max())
        every, best = stacked_pair(window(c, width), best)
        return torch.where(spread[:, None], every, best)
