"""Options that name layers, held against the layers that the model has."""

from typing import Any

from tokensieve.config import UserError
from tokensieve.model.selection import SelectionContext


def names_layer(selector: Any, c: SelectionContext) -> bool:
    """Whether the selector's `layers` have the context's. UserError if they have one that the model does not."""
    if (last := max(selector.layers, default=0)) >= c.layers:
        name = type(selector).__name__
        raise UserError(f"{name} names layer {last}, and the last of the model is layer {c.layers - 1}")
    return c.layer in selector.layers
