"""The strings that are hidden and asked for: words, numbers, identifiers and names of variables, divided by split."""

import random
import string
import uuid
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Literal

from tokensieve.tasks.documents import Split, stable_fraction
from tokensieve.tasks.words import ADJECTIVES, THINGS

Kind = Literal["words", "numbers", "uuids", "variables"]

DRAWS: Mapping[str, Callable[[random.Random], str]] = MappingProxyType(
    {
        "words": lambda rng: f"{rng.choice(ADJECTIVES)}-{rng.choice(THINGS)}",
        "numbers": lambda rng: str(rng.randrange(10**6, 10**7)),
        "uuids": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        "variables": lambda rng: "".join(rng.choices(string.ascii_uppercase, k=5)),
    }
)
FORMS: Mapping[str, str] = MappingProxyType(
    {"words": r"[a-z]+-[a-z]+", "numbers": r"\d+", "uuids": r"[0-9a-f]+(?:-[0-9a-f]+){4}", "variables": r"[a-z]{5}"}
)
"""What strings of a kind look like in an answer in lower case: a regular expression."""


def split_of(text: str) -> Split:
    """The one split that may hide or ask for a string: half of all strings each, by a hash of the text."""
    return "test" if stable_fraction("ruler " + text) < 0.5 else "train"


def draw(rng: random.Random, kind: Kind, split: Split) -> str:
    """One string of a kind and a split."""
    while split_of(text := DRAWS[kind](rng)) != split:
        pass
    return text


def overlaps(text: str, others: Iterable[str]) -> bool:
    """Whether one of them is part of the other, in which case an answer with the longer one would hold both."""
    return any(text in other or other in text for other in others)


def distinct(rng: random.Random, kind: Kind, split: Split, count: int, taken: Iterable[str] = ()) -> list[str]:
    """`count` strings, none of which is part of another or of one that is taken."""
    before = list(taken)
    strings: list[str] = []
    while len(strings) < count:
        text = draw(rng, kind, split)
        if not overlaps(text, [*before, *strings]):
            strings.append(text)
    return strings
