"""Competitive programming: a program that reads numbers and prints one, judged in the sandbox.

The expected output never enters the sandbox. The verdict is computed outside, from what the program printed.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokensieve import sandbox
from tokensieve.tasks.documents import Split
from tokensieve.tasks.problems.problem import Item

CASES = 4  # inputs of a problem
LIMITS = sandbox.Limits(seconds=4.0, cpu_seconds=2.0, output_bytes=4096)
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)

Numbers = list[int]


@dataclass(frozen=True)
class Step:
    """A step from a list to a list: its text by language and split, its line of Python, and the function itself."""

    text: dict[str, dict[Split, str]]
    line: str
    apply: Callable[[Numbers, int], Numbers]


def _texts(en: tuple[str, str], zh: tuple[str, str]) -> dict[str, dict[Split, str]]:
    return {"en": {"train": en[0], "test": en[1]}, "zh": {"train": zh[0], "test": zh[1]}}


STEPS = (
    Step(
        _texts(("Add {n} to each.", "Increase every one by {n}."), ("每个数加{n}。", "将每个数增加{n}。")),
        "x = [v + {n} for v in x]",
        lambda x, n: [v + n for v in x],
    ),
    Step(
        _texts(
            ("Multiply each by {n}.", "Replace every one by {n} times itself."),
            ("每个数乘以{n}。", "将每个数变为其{n}倍。"),
        ),
        "x = [v * {n} for v in x]",
        lambda x, n: [v * n for v in x],
    ),
    Step(
        _texts(
            ("Drop those below {n}.", "Keep only those of at least {n}."),
            ("去掉小于{n}的数。", "只保留不小于{n}的数。"),
        ),
        "x = [v for v in x if v >= {n}]",
        lambda x, n: [v for v in x if v >= n],
    ),
    Step(
        _texts(
            ("Keep the {n} largest.", "Keep no more than the {n} greatest."),
            ("保留最大的{n}个数。", "至多保留{n}个最大的数。"),
        ),
        "x = sorted(x)[-{n}:]",
        lambda x, n: sorted(x)[-n:],
    ),
)
ENDS: dict[str, tuple[dict[str, dict[Split, str]], str, Callable[[Numbers], int]]] = {
    "sum": (_texts(("Print the sum.", "Output the total."), ("输出总和。", "打印它们的和。")), "print(sum(x))", sum),
    "count": (
        _texts(
            ("Print how many are left.", "Output the count of what remains."),
            ("输出剩下的个数。", "打印剩余数的数量。"),
        ),
        "print(len(x))",
        len,
    ),
    "largest": (
        _texts(
            ("Print the largest, or 0.", "Output the maximum; 0 if there is none."),
            ("输出最大值，没有则输出0。", "打印最大的数，若无则为0。"),
        ),
        "print(max(x, default=0))",
        lambda x: max(x, default=0),
    ),
}
READ = {
    "en": {"train": "Read a line of integers.", "test": "The input is one line with whole numbers."},
    "zh": {"train": "读入一行整数。", "test": "输入为一行若干整数。"},
}


def outcome(stages: Sequence[tuple[Step, int]], end: str, numbers: Numbers) -> int:
    """What a program of these steps prints for some numbers."""
    for step, n in stages:
        numbers = step.apply(numbers, n)
    return ENDS[end][2](numbers)


@dataclass(frozen=True)
class Programming:
    """Programs over a line of integers. Difficulty: steps between reading and printing, from 1 to 6.

    An answer is a Python program, alone or in its last fenced block. Its grade is 1 if it prints what is expected for
    each of four inputs, else 0. UserError on a machine without isolation: no program runs there.
    """

    name: str = "programming"
    languages: tuple[str, ...] = ("en", "zh")
    difficulty: tuple[int, int, int] = (1, 1, 6)

    def draw(self, rng: random.Random, difficulty: int, language: str, split: Split) -> Item:
        outputs: list[int] = []
        while len({*outputs}) < 2:  # or a constant would be right
            end = rng.choice([*ENDS])
            chosen = [(step, rng.randint(2, 9)) for step in rng.choices(STEPS, k=difficulty)]
            inputs = [[rng.randint(-20, 20) for _ in range(rng.randint(1, 9))] for _ in range(CASES)]
            outputs = [outcome(chosen, end, numbers) for numbers in inputs]
        lines = [step.line.format(n=n) for step, n in chosen]
        texts = [step.text[language][split].format(n=n) for step, n in chosen]
        space = " " if language == "en" else ""
        question = space.join([READ[language][split], *texts, ENDS[end][0][language][split]])
        program = "\n".join(["x = list(map(int, input().split()))", *lines, ENDS[end][1]])
        data = [text for x, y in zip(inputs, outputs, strict=True) for text in (" ".join(map(str, x)), str(y))]
        key = " ".join([*(f"{STEPS.index(step)}:{n}" for step, n in chosen), end])
        return Item(key, question, "\n".join([*lines, ENDS[end][1]]), f"```python\n{program}\n```", tuple(data))

    def grade(self, item: Item, answer: str) -> float:
        fences = _FENCE.findall(answer)
        program = fences[-1] if fences else answer
        if not program.strip():
            return 0.0
        for given, expected in zip(item.data[::2], item.data[1::2], strict=True):
            result = sandbox.python(program, stdin=f"{given}\n".encode(), limits=LIMITS)
            if not result.succeeded or result.out.split() != [expected.encode()]:
                return 0.0
        return 1.0
