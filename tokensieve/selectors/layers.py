"""Options that name layers, or give each layer its own, held against the layers that the model has."""

from typing import Any

from tokensieve.config import UserError
from tokensieve.model.selection import SelectionContext


def names_layer(selector: Any, c: SelectionContext) -> bool:
    """Whether the selector's `layers` have the context's. UserError if they have one that the model does not."""
    if (last := max(selector.layers, default=0)) >= c.layers:
        name = type(selector).__name__
        raise UserError(f"{name} names layer {last}, and the last of the model is layer {c.layers - 1}")
    return c.layer in selector.layers


def of_layer(selector: Any, option: str, c: SelectionContext) -> Any:
    """The option's value for the layer of the context. UserError for more or fewer values than layers."""
    given = getattr(selector, option)
    if not isinstance(given, tuple | list):
        return given
    if len(given) != c.layers:
        name = type(selector).__name__
        raise UserError(f"{name} has {option} for {len(given)} layers, and the model has {c.layers}; give one for each")
    return given[c.layer]
