"""General logical reasoning: an order that is told in pairs, and the question who stands where in it."""

import random
from dataclasses import dataclass

from tokensieve.tasks.documents import Split
from tokensieve.tasks.problems.problem import Item

NAMES = {
    "en": ("Ana", "Ben", "Cara", "Dev", "Eli", "Fay", "Gus", "Ida", "Jon", "Kim", "Lea", "Max"),
    "zh": ("小明", "小红", "小刚", "小丽", "小军", "小芳", "小伟", "小敏", "小强", "小燕"),
}
# By split: a pair, and the two questions. No phrasing is in both splits. Training has several, which name the two of a
# pair in either order, so that a model learns the relation and not the place.
Phrasings = tuple[str, ...]
PHRASES: dict[str, dict[Split, tuple[Phrasings, Phrasings, Phrasings]]] = {
    "en": {
        "train": (
            (
                "{a} is older than {b}.",
                "{b} is younger than {a}.",
                "{a} has more years than {b}.",
                "{b} has fewer years than {a}.",
                "{b} is not as old as {a}.",
            ),
            ("Who is the oldest?", "Who has the most years?", "Name the oldest."),
            ("Who is the youngest?", "Who has the fewest years?", "Name the youngest."),
        ),
        "test": (("{b} was born after {a}.",), ("Whose birthday came first?",), ("Whose birthday came last?",)),
    },
    "zh": {
        "train": (("{a}比{b}年长。", "{b}比{a}年轻。"), ("谁最年长？",), ("谁最年轻？",)),
        "test": (("{b}在{a}之后出生。",), ("谁最先出生？",), ("谁最后出生？",)),
    },
}


@dataclass(frozen=True)
class Logic:
    """A total order of people, told as its neighbouring pairs in any order. Difficulty: people, from 2 to 10.

    An answer is right if it is the name, or names this person alone.
    """

    name: str = "logic"
    languages: tuple[str, ...] = ("en", "zh")
    difficulty: tuple[int, int, int] = (2, 4, 10)

    def draw(self, rng: random.Random, difficulty: int, language: str, split: Split) -> Item:
        pair, first, last = map(rng.choice, PHRASES[language][split])
        people = rng.sample(NAMES[language], difficulty)
        pairs = [(people[place], people[place + 1]) for place in range(difficulty - 1)]
        rng.shuffle(pairs)
        asks_first = rng.random() < 0.5
        space = " " if language == "en" else ""
        told = space.join(pair.format(a=a, b=b) for a, b in pairs)
        answer = people[0] if asks_first else people[-1]
        key = f"{' '.join(people)} {'first' if asks_first else 'last'}"
        question = f"{told}{space}{first if asks_first else last}"
        return Item(key, question, " > ".join(people), answer, (answer, *sorted(people)))

    def grade(self, item: Item, answer: str) -> float:
        right, *people = item.data
        return float({name for name in people if name in answer} == {right})
