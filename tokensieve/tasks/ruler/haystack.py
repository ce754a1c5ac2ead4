"""Text of a given length in tokens, and lines hidden in it.

Text is put together as text and tokenized as a whole, so no token ends where a model would not expect it.
"""

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate, cycle
from typing import Literal

from tokensieve.config import UserError
from tokensieve.tasks.documents import Document
from tokensieve.tasks.encoder import PlainEncoder

Haystack = Literal["documents", "filler", "pairs"]
"""Real documents, a few sentences that repeat, or nothing but more lines of the task's own form."""

PIECE = 300  # characters at most: a context is shorter than its length by no more than the tokens of one piece
BEGINNING = 1200  # characters of a document among others
_PIECES = re.compile(rf"[^\n]{{0,{PIECE}}}?(?:[.!?] |\n+|\Z)|[^\n]{{{PIECE}}}")
FILLER = (
    "The rain stopped before noon. ",
    "A bus waited at the corner. ",
    "Somebody had left the window open. ",
    "Dinner was served at seven. ",
    "The dog slept under the table. ",
)

Hidden = Sequence[tuple[str, float]]  # lines, and the shares of the text after which they stand


def pieces(text: str) -> list[str]:
    """The lines and sentences of a text, in order: joined they are the text."""
    return [piece for piece in _PIECES.findall(text) if piece]


def of_documents(rng: random.Random, documents: Sequence[Document], what: str) -> Iterator[str]:
    """Pieces of whole documents in turn, without end, from a drawn document on.

    Raises:
        UserError: no document holds any text; the message names them as `what`.
    """
    if not any(document.text.strip() for document in documents):
        raise UserError(f"no {what} documents to hide lines in; name a source with some, or use the haystack filler")
    first = rng.randrange(len(documents))
    for document in cycle([*documents[first:], *documents[:first]]):
        yield from pieces(document.text.rstrip("\n") + "\n\n")


def beginnings(
    rng: random.Random, documents: Sequence[Document], what: str, heading: Callable[[str], str]
) -> Iterator[str]:
    """Pieces of the beginnings of documents in a drawn order, without end, each after a piece with its heading.

    heading: of a document's name. Errors as in `of_documents`.
    """
    held = [document for document in documents if document.text.strip()]
    if not held:
        raise UserError(f"no {what} documents to hide others among; name a source with some")
    for document in cycle(rng.sample(held, len(held))):
        yield heading(document.name) + "\n"
        yield from pieces(document.text[:BEGINNING].rstrip("\n") + "\n\n")


def without(source: Iterator[str], secrets: Sequence[str]) -> Iterator[str]:
    """The pieces that hold none of the secrets, in whatever case.

    Raises:
        UserError: ten thousand pieces in a row hold one.
    """
    held = 0
    for piece in source:
        if any(secret.lower() in piece.lower() for secret in secrets):
            held += 1
            if held == 10_000:
                raise UserError("every piece of the haystack holds what is to be hidden in it; name another source")
            continue
        held = 0
        yield piece


def shares(rng: random.Random, count: int, tenth: int | None) -> list[float]:
    """Depths for `count` lines, in random order: one in each `count`th of the text, or all within one tenth."""
    if tenth is not None:
        return [(tenth + rng.uniform(0.1, 0.9)) / 10 for _ in range(count)]
    return [(slot + rng.random()) / count for slot in rng.sample(range(count), count)]


def hiding(
    encode: PlainEncoder, head: str, lines: Hidden, source: Iterator[str], before: str = ""
) -> Callable[[int], str]:
    """A function from n to a text: the head, the first n pieces of the source, and the lines between these.

    Depths are shares of the pieces' tokens. A line stands on a line of its own, or between sentences. before: how the
    pieces begin that a line may precede, such as the headings of documents, lest it part one; a line goes forward to
    the next such piece, or to the end.
    """
    size = cache(lambda piece: len(encode(piece)))  # a filler's few sentences come again and again
    taken: list[str] = []
    tokens: list[int] = []

    def build(count: int) -> str:
        while len(taken) < count:
            taken.append(next(source))
            tokens.append(size(taken[-1]))
        ends = list(accumulate(tokens[:count]))
        places: list[list[str]] = [[] for _ in range(count + 1)]
        for line, share in sorted(lines, key=lambda hidden: hidden[1]):
            at = bisect_left(ends, share * ends[-1]) if ends else 0
            while at < count and not taken[at].startswith(before):
                at += 1
            places[at].append(line)
        parts = [head]
        for place, piece in zip(places, [*taken[:count], ""], strict=True):
            for line in place:
                parts += [line, "\n" if parts[-1].endswith("\n") else " "]
            parts.append(piece)
        return "".join(part for part in parts if part)

    return build


def fitted(encode: PlainEncoder, build: Callable[[int], str], budget: int) -> str | None:
    """The text build(n) of the largest n that takes at most `budget` tokens; None if build(0) takes more."""

    def size(count: int) -> int:
        return len(encode(build(count)))

    # Sizes grow almost evenly: where the line through two of them meets the budget is a good guess.
    fits, high = 0, 1
    least, most = size(0), size(1)
    if least > budget:
        return None
    while most <= budget:
        ahead = (high - fits) * (budget - most) // max(1, most - least) + 1
        fits, least, high = high, most, high + min(ahead, 3 * high)
        most = size(high)
    while high - fits > 1:
        guess = fits + (high - fits) * (budget - least) // (most - least)
        guess = min(max(guess, fits + 1), high - 1)
        tokens = size(guess)
        if tokens <= budget:
            fits, least = guess, tokens
        else:
            high, most = guess, tokens
    return build(fits)
