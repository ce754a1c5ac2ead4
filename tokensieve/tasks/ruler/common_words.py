"""Common words: a long list of words, some of which come often, and which these are."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from tokensieve.config import UserError
from tokensieve.tasks.documents import Split
from tokensieve.tasks.ruler.question import LongTask, Puzzle, Question
from tokensieve.tasks.ruler.strings import overlaps, split_of
from tokensieve.tasks.words import ADJECTIVES, SALAD, SYLLABLES, THINGS

WORDS = tuple(word for word in sorted({*ADJECTIVES, *THINGS, *SALAD}) if len(word) > 3)


@dataclass(frozen=True, kw_only=True)
class CommonWords(LongTask):
    """A list in random order of `common` words, `often` times each, among others that come `rarely` times each.

    As many other words as fit fill the context: those of everyday language first, then words that do not exist. There
    is one question in a context, and no haystack.

    Raises:
        UserError: a haystack or a depth is given.
    """

    common: int = 10
    often: int = 30
    rarely: int = 3
    name: str = "common_words"

    def __post_init__(self) -> None:
        if self.haystack != "documents" or self.depth is not None:
            raise UserError(f"{self.name}: its words are all of its text; leave out haystack and depth")

    @property
    def form(self) -> str:
        return r"[a-z]{4,}"

    def puzzle(self, rng: random.Random, split: Split) -> Puzzle:
        """One context's text and its question. UserError: numbers that leave nothing to find."""
        if self.common < 1 or not 0 < self.rarely < self.often:
            raise UserError(
                f"{self.name}: {self.common} words {self.often} times among words {self.rarely} times: use at least 1 "
                "word, and more often than rarely"
            )
        words = _words(rng, split)
        common = list(islice(_apart(words, []), self.common))
        others, drawn = _apart(words, common), list[str]()
        seed = rng.random()

        def build(count: int) -> str:
            drawn.extend(islice(others, max(0, count - len(drawn))))
            items = common * self.often + drawn[:count] * self.rarely
            random.Random(seed).shuffle(items)
            return f"{head}{', '.join(items)}."

        head = "Some words of the following list come much more often than the others. Count them.\n\n"
        one = self.common == 1
        what = "word that comes most often" if one else f"{self.common} words that come most often"
        verb = "is" if one else "are"
        text, begun = f"Which {verb} the {what} in the list above?", f"The {what} {verb}"
        return Puzzle(build, [Question(text, begun, tuple(common))])


def _words(rng: random.Random, split: Split) -> Iterator[str]:
    """Words of a split without end, none twice."""
    real = [word for word in WORDS if split_of(word) == split]
    yield from rng.sample(real, len(real))
    seen = set(real)
    while True:
        word = "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3)))
        if len(word) > 3 and word not in seen and split_of(word) == split:
            seen.add(word)
            yield word


def _apart(words: Iterator[str], others: list[str]) -> Iterator[str]:
    """The words that neither hold one of the others nor are part of it; without others, the same of each other."""
    chosen = list(others)
    for word in words:
        if not overlaps(word, chosen):
            if not others:
                chosen.append(word)
            yield word
