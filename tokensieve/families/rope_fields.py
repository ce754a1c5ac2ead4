"""The fields of config.json about rotary positions: which types are supported, and which values they need.

The published form is `rope_scaling` beside `rope_theta`, that of transformers 5 is `rope_parameters` with both in it.
Source: YaRN, arXiv 2309.00071; the config.json of DeepSeek-V3.2-Exp, Llama 3.1 and Qwen2.5.
"""

import math
from collections.abc import Mapping
from typing import Any

from tokensieve.config import UserError

# of each type: field: the smallest value, and whether null stands for a default
_SCALE = {"factor": (1.0, False)}
_ORIGINAL = {"original_max_position_embeddings": (1.0, False)}
_NUMBERS: dict[str, dict[str, tuple[float, bool]]] = {
    "default": {},
    "linear": _SCALE,
    "llama3": _SCALE | _ORIGINAL | {"low_freq_factor": (1e-6, False), "high_freq_factor": (1e-6, False)},
    "yarn": {
        "factor": (1.0, True),
        **_ORIGINAL,
        "beta_fast": (1e-6, True),
        "beta_slow": (1e-6, True),
        "mscale": (0.0, True),
        "mscale_all_dim": (0.0, True),
        "attention_factor": (1e-6, True),
    },
}
_NEEDED = ("factor", "low_freq_factor", "high_freq_factor")  # the others have defaults
_CHANGING = "its frequencies change with the length of the text, and keys in a cache are rotated already"
_REASONS = {"dynamic": _CHANGING, "longrope": _CHANGING, "mrope": "it is for models that see images"}


def rope_type(rope: Mapping[str, Any]) -> Any:
    """The type that the fields name, under either of its two names; "default" if they name none."""
    return rope.get("rope_type") or rope.get("type") or "default"


def check_rope(name: str, rope: Any) -> None:
    """Raises UserError, naming the field, for an unsupported type and for values that a type cannot have.

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
    if str(kind) not in _NUMBERS:
        reason = f", since {_REASONS[str(kind)]}" if str(kind) in _REASONS else ""
        raise UserError(
            f"config.json: rope type {kind!r} is not supported{reason}; tokensieve implements {', '.join(_NUMBERS)}"
        )
    check_number(f"{name}.rope_theta", rope.get("rope_theta", 10000.0), 1e-6)
    for field, (least, nullable) in _NUMBERS[kind].items():
        if field in rope and not (nullable and rope[field] is None):
            check_number(f"{name}.{field}", rope[field], least)
        elif field not in rope and field in _NEEDED:
            raise UserError(
                f"config.json: {name} of type {kind!r} lacks {field}; copy it from the original config.json"
            )
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise UserError(
            f"config.json: {name}.high_freq_factor is {rope['high_freq_factor']}; it must be above low_freq_factor "
            f"{rope['low_freq_factor']}"
        )


def check_number(name: str, value: Any, least: float) -> None:
    """Raises UserError unless `value` is a finite number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        bound = f"of at least {least:g}" if least >= 1 else "that is not negative" if least == 0 else "above 0"
        raise UserError(f"config.json: {name} is {value!r}; it must be a number {bound}")
