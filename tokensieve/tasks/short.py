"""Short questions with choices, generated: sums, copying, sequences and looking up.

What they are for: prompts far below k, where selection changes nothing, so a difference between a model and what it was
before adaptation is what the training did. They are easy on purpose, so that a model of a hundred million parameters is
above chance. They say nothing of knowledge or reasoning, and are no substitute for public benchmarks.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokensieve.config import UserError
from tokensieve.tasks.contract import Answer, Example, Score
from tokensieve.tasks.documents import Split
from tokensieve.tasks.ruler.strings import split_of
from tokensieve.tasks.words import THINGS

SHOTS = 3  # worked examples before a question
CHOICES = 4


@dataclass(frozen=True, kw_only=True)
class ChoiceExample(Example):
    """A question whose answer is one of `choices`, each of which goes on with the prompt; `right` is one of them."""

    choices: tuple[str, ...]
    right: str


@dataclass(frozen=True)
class Item:
    """A line, or lines, up to where the answer begins, and answers."""

    asked: str
    right: str
    wrong: tuple[str, ...]


def _sum(rng: random.Random, size: int) -> Item:
    a, b = rng.randint(1, size), rng.randint(1, size)
    return Item(f"{a} + {b} =", f" {a + b}", _near(rng, a + b))


def _copy(rng: random.Random, size: int) -> Item:
    words = rng.sample(THINGS, max(size, CHOICES))
    asked = f"{' '.join(words)} / {' '.join(words[:-1])}"
    return Item(asked, f" {words[-1]}", tuple(f" {word}" for word in rng.sample(words[:-1], CHOICES - 1)))


def _sequence(rng: random.Random, size: int) -> Item:
    first, step = rng.randint(1, 20), rng.randint(1, size)
    numbers = [first + step * place for place in range(6)]
    return Item(" ".join(map(str, numbers[:-1])), f" {numbers[-1]}", _near(rng, numbers[-1]))


def _lookup(rng: random.Random, size: int) -> Item:
    keys = rng.sample(THINGS, max(size, CHOICES))
    values = [str(value) for value in rng.sample(range(1000, 10000), len(keys))]
    place = rng.randrange(len(keys))
    pairs = "\n".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
    others = values[:place] + values[place + 1 :]
    wrong = tuple(f" {value}" for value in rng.sample(others, CHOICES - 1))
    return Item(f"{pairs}\n{keys[place]}:", f" {values[place]}", wrong)


def _near(rng: random.Random, number: int) -> tuple[str, ...]:
    """Other numbers close to it, of as many digits."""
    near = [n for n in range(max(0, number - 10), number + 11) if n != number and len(str(n)) == len(str(number))]
    return tuple(f" {n}" for n in rng.sample(near, CHOICES - 1))


MAKES: Mapping[str, tuple[Callable[[random.Random, int], Item], int, int]] = MappingProxyType(
    {"sums": (_sum, 20, 3), "copying": (_copy, 6, 4), "sequences": (_sequence, 5, 1), "lookup": (_lookup, 4, 4)}
)
"""By name: what makes an item, its difficulty unless one is given, and the least difficulty."""


@dataclass(frozen=True)
class Choices:
    """Four choices after three worked examples (a `Task`); chance is one in four. The prompt is plain text, for models
    with a chat template too: likelihoods of choices are compared, and nothing is generated.

    Difficulty: "sums", the largest number that is added; "copying", the words of a list that is repeated up to its last
    one; "sequences", the largest step between the numbers; "lookup", the keys with a value, one of which comes again.

    name: one of these four.
    """

    name: str

    def examples(self, split: Split, count: int, difficulty: int | None = None, seed: int = 0) -> list[ChoiceExample]:
        """`count` examples. No item is in both splits, as a question or as a worked example.

        Raises:
            UserError: an unknown name, or a difficulty that leaves nothing to ask.
        """
        if self.name not in MAKES:
            raise UserError(f"short task {self.name!r} is unknown; use one of {', '.join(MAKES)}")
        make, usual, least = MAKES[self.name]
        size = usual if difficulty is None else difficulty
        if size < least:
            raise UserError(f"{self.name}: no examples of difficulty {size}; use at least {least}")
        rng = random.Random(f"{self.name} {split} {size} {seed}")

        def item() -> Item:
            while split_of((found := make(rng, size)).asked) != split:
                pass
            return found

        examples = []
        for _ in range(count):
            *shown, asked = (item() for _ in range(SHOTS + 1))
            choices = [asked.right, *asked.wrong]
            rng.shuffle(choices)
            prompt = "".join(f"{one.asked}{one.right}\n\n" for one in shown) + asked.asked
            examples.append(ChoiceExample(name=asked.asked, prompt=prompt, choices=tuple(choices), right=asked.right))
        return examples

    def score(self, example: ChoiceExample, answer: Answer) -> Score:
        """1 if the answer is the right choice, else 0."""
        return Score(float(answer.text == example.right))

    def reward(self, example: ChoiceExample, answer: Answer) -> float:
        """The score, whatever space is around the answer."""
        return float(answer.text.strip() == example.right.strip())
