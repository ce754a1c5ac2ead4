"""Whole numbers that users write, in options, configs and JSON: of at most 64 bits with a sign, as in TOML.

Python's own have any length. What comes after cannot hold those: floats, tensors, the system.
"""

import json
import re
from typing import Any

LARGEST = 2**63 - 1
WHOLE = re.compile(r"[+-]?\d+")


def is_too_large(value: Any) -> bool:
    """Whether a value is a whole number beyond `LARGEST`."""
    return isinstance(value, int) and abs(value) > LARGEST


def read_integer(text: str) -> int:
    """The number of decimal digits. ValueError: anything else, or too large."""
    text = text.strip()
    if not WHOLE.fullmatch(text):
        raise ValueError(f"{text[:40]} is no whole number")
    digits = text.lstrip("+-").lstrip("0")
    if len(digits) > len(str(LARGEST)) or is_too_large(int(digits or "0")):
        raise ValueError(f"a whole number of {len(digits)} digits, and the largest is {LARGEST}")
    return int(text)


def read_json(text: str) -> Any:
    """The value of JSON. ValueError: no JSON, nested too deeply, or a whole number is too large."""
    try:
        return json.loads(text, parse_int=read_integer)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
