"""The fields of config.json about rotary positions: which types are supported, and which values YaRN needs.

The published form is `rope_scaling` beside `rope_theta`, that of transformers 5 is `rope_parameters` with both in it.
Source: YaRN, arXiv 2309.00071; the config.json of DeepSeek-V3.2-Exp.
"""

import math
from collections.abc import Mapping
from typing import Any

from tokensieve.config import UserError

_SUPPORTED = ("default", "yarn")
# field: the smallest value, and whether the field may be null or missing
_NUMBERS = {
    "factor": (1.0, True),
    "original_max_position_embeddings": (1.0, False),
    "beta_fast": (1e-6, True),
    "beta_slow": (1e-6, True),
    "mscale": (0.0, True),
    "mscale_all_dim": (0.0, True),
    "attention_factor": (1e-6, True),
}


def rope_type(rope: Mapping[str, Any]) -> Any:
    """The type that the fields name, under either of its two names; "default" if they name none."""
    return rope.get("rope_type") or rope.get("type") or "default"


def check_rope(name: str, rope: Any) -> None:
    """Raises UserError, naming the field, for an unsupported type and for values that YaRN cannot have.

    name: the field of config.json that holds `rope`, which is a mapping, or None or empty for plain frequencies.
    """
    if not rope:
        return
    if not isinstance(rope, Mapping):
        raise UserError(f"config.json: {name} is {rope!r}; it must be an object, or null for plain positions")
    for field, value in rope.items():
        if isinstance(value, Mapping):
            raise UserError(
                f"config.json: {name}.{field} is an object of its own, as in models with several kinds of layers, "
                "which are not supported; give one set of rotary fields"
            )
    kind = rope_type(rope)
    if kind not in _SUPPORTED:
        raise UserError(f"config.json: rope type {kind!r} is not supported; tokensieve implements 'default' and 'yarn'")
    check_number(f"{name}.rope_theta", rope.get("rope_theta", 10000.0), 1e-6)
    if kind == "default":
        return
    if "factor" not in rope:
        raise UserError(f"config.json: {name} of type 'yarn' lacks factor; copy it from the original config.json")
    for field, (least, optional) in _NUMBERS.items():
        value = rope.get(field, None if optional else 1)  # transformers replaces a missing original by the model's own
        if value is not None or not optional:
            check_number(f"{name}.{field}", value, least)


def check_number(name: str, value: Any, least: float) -> None:
    """Raises UserError unless `value` is a finite number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        bound = f"of at least {least:g}" if least >= 1 else "that is not negative" if least == 0 else "above 0"
        raise UserError(f"config.json: {name} is {value!r}; it must be a number {bound}")
