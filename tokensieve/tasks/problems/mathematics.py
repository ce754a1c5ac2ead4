"""Mathematics: a number that changes step by step, told as a little story."""

import random
import re
from dataclasses import dataclass

from tokensieve.tasks.documents import Split
from tokensieve.tasks.problems.problem import Item

NAMES = {"en": ("Ana", "Ben", "Cara", "Dev", "Eli", "Fay", "Gus", "Ida"), "zh": ("小明", "小红", "小刚", "小丽")}
GOODS = {"en": ("apples", "books", "coins", "shells", "stamps"), "zh": ("个苹果", "本书", "枚硬币", "张邮票")}
# By split: beginning, more, fewer, times, question. No phrasing is in both.
PHRASES: dict[str, dict[Split, tuple[str, str, str, str, str]]] = {
    "en": {
        "train": (
            "{name} has {n} {goods}.",
            "{name} gets {n} more.",
            "{name} gives {n} away.",
            "Then the number becomes {n} times as large.",
            "How many {goods} does {name} have now?",
        ),
        "test": (
            "At first {name} owns {n} {goods}.",
            "Then {n} are added.",
            "Then {n} are lost.",
            "Now there are {n} times as many as before.",
            "What is the number of {goods} that {name} owns in the end?",
        ),
    },
    "zh": {
        "train": (
            "{name}有{n}{goods}。",
            "又得到{n}{goods}。",
            "送出{n}{goods}。",
            "数量变为原来的{n}倍。",
            "现在{name}有多少{goods}？",
        ),
        "test": (
            "起初{name}拥有{n}{goods}。",
            "后来增加了{n}。",
            "后来减少了{n}。",
            "随后变成之前的{n}倍。",
            "最后{name}一共拥有多少{goods}？",
        ),
    },
}
_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Mathematics:
    """Whole numbers that stay between 0 and 9999. Difficulty: steps, from 1 to 12; with more than 2, products too.

    An answer is right if its last number is the result.
    """

    name: str = "mathematics"
    languages: tuple[str, ...] = ("en", "zh")
    difficulty: tuple[int, int, int] = (1, 2, 12)

    def draw(self, rng: random.Random, difficulty: int, language: str, split: Split) -> Item:
        begin, more, fewer, times, ask = PHRASES[language][split]
        name, goods = rng.choice(NAMES[language]), rng.choice(GOODS[language])
        value = first = rng.randint(2, 60)
        told, thoughts, key = [begin.format(name=name, n=first, goods=goods)], [], [str(first)]
        for _ in range(difficulty):
            kinds = ["+"] + ["-"] * (value > 1) + ["*"] * (difficulty > 2 and value <= 2000)
            kind = rng.choice(kinds)
            n = rng.randint(2, 4) if kind == "*" else rng.randint(1, min(40, value - 1) if kind == "-" else 40)
            result = {"+": value + n, "-": value - n, "*": value * n}[kind]
            told.append({"+": more, "-": fewer, "*": times}[kind].format(name=name, n=n, goods=goods))
            thoughts.append(f"{value} {kind} {n} = {result}")
            key.append(f"{kind}{n}")
            value = result
        space = " " if language == "en" else ""
        question = space.join([*told, ask.format(name=name, goods=goods)])
        return Item(" ".join(key), question, "\n".join(thoughts), str(value), (str(value),))

    def grade(self, item: Item, answer: str) -> float:
        numbers = _NUMBER.findall(answer.replace(",", ""))
        return float(bool(numbers) and numbers[-1].lstrip("0") == item.data[0].lstrip("0"))
