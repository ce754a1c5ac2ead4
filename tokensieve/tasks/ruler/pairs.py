"""Keys with values hidden in a long text, and questions for the values: RULER's needles of all kinds."""

import random
from dataclasses import dataclass

from tokensieve.config import UserError
from tokensieve.tasks.documents import Split
from tokensieve.tasks.encoder import encoder
from tokensieve.tasks.ruler.haystack import hiding, shares
from tokensieve.tasks.ruler.question import LongTask, Puzzle, Question
from tokensieve.tasks.ruler.strings import FORMS, Kind, distinct, draw

NOUNS = {"words": "password", "numbers": "access code", "uuids": "serial number"}


@dataclass(frozen=True, kw_only=True)
class Pairs(LongTask):
    """Values of keys: lines "The access code of amber-falcon is 1234567." and questions for some of them.

    A single needle is one key; multi-key, many keys with one value each; multi-value, keys with many values, all asked
    for at once; multi-query, several keys asked for at once. Unasked keys are there to be confused with.

    keys: in a context, besides those of the haystack "pairs", which has as many as fit.
    values: of each key. together: keys that one question asks for. asked: questions of a context.
    key, value: kinds of strings. depth: a tenth of the context, 0 to 9, in which all lines lie; None spreads them.
    """

    keys: int = 1
    values: int = 1
    together: int = 1
    asked: int = 1
    key: Kind = "words"
    value: Kind = "numbers"
    name: str = "pairs"

    @property
    def form(self) -> str:
        return FORMS[self.value]

    def puzzle(self, rng: random.Random, split: Split) -> Puzzle:
        """One context's text and questions.

        Raises:
            UserError: more keys asked for than there are, a number below 1, or a kind that is no key or no value.
        """
        if min(self.values, self.together, self.asked) < 1 or self.asked * self.together > self.keys:
            raise UserError(
                f"{self.name}: {self.asked} questions for {self.together} keys with {self.values} values cannot be "
                f"asked of {self.keys} keys; ask for at least 1 of each, and for no more keys than there are"
            )
        if self.key not in NOUNS or self.value not in NOUNS:
            raise UserError(f"{self.name}: {self.key} and {self.value}: keys and values are {', '.join(NOUNS)}")
        noun = NOUNS[self.value]
        keys = distinct(rng, self.key, split, self.keys)
        drawn = distinct(rng, self.value, split, self.keys * self.values, keys)
        values = {key: drawn[i * self.values : (i + 1) * self.values] for i, key in enumerate(keys)}
        lines = [self._line(key, value) for key in keys for value in values[key]]
        hidden = list(zip(lines, shares(rng, len(lines), self.depth), strict=True))
        source = self.source(
            rng,
            split,
            secrets=[*keys, *drawn],
            more=lambda: self._line(draw(rng, self.key, split), draw(rng, self.value, split)),
        )
        head = f"Remember every {noun} in the following text. You will be asked for some at its end.\n\n"
        groups = [keys[i * self.together : (i + 1) * self.together] for i in range(self.asked)]
        return Puzzle(
            hiding(encoder(self.tokenizer), head, hidden, source), [self._question(keys, values) for keys in groups]
        )

    def _line(self, key: str, value: str) -> str:
        return f"{'The' if self.values == 1 else 'One'} {NOUNS[self.value]} of {key} is {value}."

    def _question(self, keys: list[str], values: dict[str, list[str]]) -> Question:
        expected = [value for key in keys for value in values[key]]
        one = len(expected) == 1
        count = f"{self.values} " if self.values > 1 else ""
        what = f"{count}{NOUNS[self.value]}{'' if one else 's'} of {_listed(keys)}"
        return Question(
            text=f"What {'is' if one else 'are'} the {what} in the text above?",
            begun=f"The {what} {'is' if one else 'are'}",
            expected=tuple(expected),
            line=self._line(keys[0], expected[0]) if one else None,
        )


def _listed(words: list[str]) -> str:
    """The words with commas, and "and" before the last."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
