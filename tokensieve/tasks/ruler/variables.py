"""Variable tracking: chains of assignments hidden in a long text, and which variables have a value."""

import random
from dataclasses import dataclass
from itertools import pairwise

from tokensieve.config import UserError
from tokensieve.tasks.documents import Split
from tokensieve.tasks.encoder import encoder
from tokensieve.tasks.ruler.haystack import hiding, shares
from tokensieve.tasks.ruler.question import LongTask, Puzzle, Question
from tokensieve.tasks.ruler.strings import FORMS, distinct, draw


@dataclass(frozen=True, kw_only=True)
class Variables(LongTask):
    """Chains "Let ABCDE = 1234567.", "Let FGHIJ = ABCDE." and so on, in their order; every chain is asked for.

    The question names a value and how many variables have it: `hops` + 1.

    chains: in a context; with the haystack "pairs" further variables, one assignment each, fill the rest.
    hops: assignments of a chain after its first. depth: a tenth of the context in which all lie; None spreads them.
    """

    chains: int = 1
    hops: int = 4
    name: str = "variables"

    @property
    def form(self) -> str:
        return FORMS["variables"]

    def puzzle(self, rng: random.Random, split: Split) -> Puzzle:
        """One context's text and questions. UserError: no chain, or fewer than 0 hops."""
        if self.chains < 1 or self.hops < 0:
            raise UserError(f"{self.name}: use at least 1 chain and 0 hops, not {self.chains} and {self.hops}")
        length = self.hops + 1
        values = distinct(rng, "numbers", split, self.chains)
        names = distinct(rng, "variables", split, self.chains * length)
        chains = [names[i * length : (i + 1) * length] for i in range(self.chains)]
        depths = shares(rng, len(names), self.depth)
        hidden: list[tuple[str, float]] = []
        for number, (value, chain) in enumerate(zip(values, chains, strict=True)):
            lines = [_line(chain[0], value), *(_line(new, old) for old, new in pairwise(chain))]
            hidden += zip(lines, sorted(depths[number * length : (number + 1) * length]), strict=True)
        source = self.source(
            rng,
            split,
            secrets=[*names, *values],
            more=lambda: _line(draw(rng, "variables", split), draw(rng, "numbers", split)),
        )
        head = (
            "The following text assigns values to variables, some by way of other variables: after Let P = 7. and "
            "Let Q = P. the variables P and Q have the value 7. Keep track of them.\n\n"
        )
        questions = [_question(value, chain) for value, chain in zip(values, chains, strict=True)]
        return Puzzle(hiding(encoder(self.tokenizer), head, hidden, source), questions)


def _line(name: str, value: str) -> str:
    return f"Let {name} = {value}."


def _question(value: str, chain: list[str]) -> Question:
    one = len(chain) == 1
    what = f"variable that has the value {value}" if one else f"{len(chain)} variables that have the value {value}"
    return Question(
        text=f"Which {'is' if one else 'are'} the {what} in the text above?",
        begun=f"The {what} {'is' if one else 'are'}",
        expected=tuple(chain),
        line=_line(chain[0], value) if one else None,
    )
