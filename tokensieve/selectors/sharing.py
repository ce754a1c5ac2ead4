"""Layers that share a selection (IndexCache, arXiv 2603.12201), as a selector: to try it before a model is made so."""

from dataclasses import dataclass

from torch import Tensor

from tokensieve.config import UserError
from tokensieve.model.selection import SelectionContext
from tokensieve.selectors.layers import names_layer


@dataclass(frozen=True)
class Shared:
    """The top k, but a layer in `layers` reads what the layer before it reads, and its own indexer computes nothing.

    `tokensieve share` makes a model whose layers do so without an indexer. UserError for layer 0, which has none before
    it.
    """

    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(layer < 1 for layer in self.layers):
            raise UserError(f"Shared(layers={list(self.layers)}): the first layer to read another's keys is layer 1")

    def __call__(self, c: SelectionContext) -> Tensor | None:
        return c.before if names_layer(self, c) else c.topk()
