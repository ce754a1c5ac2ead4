"""Writing: a short text on a subject, with a rubric of its own."""

import random
from dataclasses import dataclass

from tokensieve.tasks.documents import Split
from tokensieve.tasks.problems.checks import CHECKS, met
from tokensieve.tasks.problems.problem import Item
from tokensieve.tasks.words import ADJECTIVES, THINGS

# By split, and no phrasing in both: the task, and how each wish is told. Training has several phrasings of each, so
# that a small model learns to take a text's words from the question, wherever they stand in it.
ASKS: dict[Split, tuple[str, ...]] = {
    "train": (
        "Write a short text about a {a} {b}.",
        "Subject: {a} {b}. Describe it briefly.",
        "Tell me something of a {a} {b}.",
        "{a} {b}: what is there to say of it?",
        "I need a few words for the {a} {b}.",
        "The {a} {b}, in plain words.",
        "Please note down what comes to your mind about one {a} {b}.",
        "Text wanted; it is on the {a} {b}.",
        "Give an account of any {a} {b}.",
        "Theme {a} {b}; be brief.",
        "What would you tell a friend of that {a} {b}?",
        "Picture a {a} {b} and put it into words.",
    ),
    "test": ("Compose some lines on this: {a} {b}.",),
}
WISHES: dict[str, dict[Split, tuple[str, ...]]] = {
    "sentences": {
        "train": (
            "Use {0} sentences.",
            "Sentences: {0}.",
            "{0} sentences are wanted.",
            "Make {0} sentences of it.",
            "Its length is {0} sentences.",
            "Stop after {0} sentences.",
            "Exactly {0} sentences, please.",
            "The text has {0} sentences.",
        ),
        "test": ("It should consist of {0} sentences.",),
    },
    "most words": {
        "train": (
            "Use no more than {0} words.",
            "At most {0} words.",
            "{0} words are the limit.",
            "Spend {0} words or fewer.",
            "The text is not longer than {0} words.",
            "Stay below or at {0} words.",
        ),
        "test": ("Keep it within {0} words.",),
    },
    "names": {
        "train": (
            'The word "{0}" must occur.',
            'Mention "{0}".',
            '"{0}" has to be in it.',
            'One of its words is "{0}".',
            'Include "{0}" somewhere.',
            'It talks of "{0}" too.',
        ),
        "test": ('Work in the word "{0}".',),
    },
    "avoids": {
        "train": (
            'Do not use the word "{0}".',
            'Avoid "{0}".',
            '"{0}" may not occur.',
            'Never say "{0}".',
            'Go without the word "{0}".',
            'The word "{0}" is forbidden.',
        ),
        "test": ('Leave the word "{0}" out.',),
    },
    "begins": {
        "train": (
            'Begin with the word "{0}".',
            'First comes the word "{0}".',
            '"{0}" opens the text.',
            'Start with "{0}".',
            'The first of all words is "{0}".',
            'Put "{0}" in front.',
        ),
        "test": ('Let "{0}" be the first word.',),
    },
}


@dataclass(frozen=True)
class Writing:
    """Texts that obey wishes. Difficulty: wishes beside the number of sentences, from 1 to 4.

    The rubric has a criterion for each wish (`checks`), which a judge scores; `grade` is the share that rules find met.
    A text that does not name its subject, or has fewer than three words for each sentence, is worth nothing: a word
    alone would meet half of the wishes. What rules cannot see, such as sense and style, is the judge's alone.
    """

    name: str = "writing"
    languages: tuple[str, ...] = ("en",)
    difficulty: tuple[int, int, int] = (1, 2, 4)

    def draw(self, rng: random.Random, difficulty: int, language: str, split: Split) -> Item:
        adjective, thing = rng.choice(ADJECTIVES), rng.choice(THINGS)
        count = rng.randint(2, 4)
        other, shunned, opening = rng.sample([word for word in THINGS if word != thing], 3)
        values = {"most words": 12 * count, "names": other, "avoids": shunned, "begins": opening}
        chosen = {"sentences": count} | {kind: values[kind] for kind in rng.sample([*values], difficulty)}
        asked = [rng.choice(ASKS[split]).format(a=adjective, b=thing)]
        asked += [rng.choice(WISHES[kind][split]).format(value) for kind, value in chosen.items()]
        first = opening.capitalize() if "begins" in chosen else "Here"
        lines = [f"{first} is a {adjective} {thing}."]
        lines += [f"It stands near the {other}.", "It is quiet.", "Nobody knows it well."][: count - 1]
        rubric = tuple(CHECKS[kind].criterion(value) for kind, value in chosen.items())
        needed = (CHECKS["names"].criterion(thing), CHECKS["least words"].criterion(3 * count))
        key = " ".join([adjective, thing, *(f"{kind}={value}" for kind, value in chosen.items())])
        return Item(key, " ".join(asked), "\n".join(rubric), " ".join(lines), needed, (*needed, *rubric))

    def grade(self, item: Item, answer: str) -> float:
        if not all(met(criterion, answer) for criterion in item.data):
            return 0.0
        wishes = item.rubric[len(item.data) :]
        return sum(met(criterion, answer) for criterion in wishes) / len(wishes)
