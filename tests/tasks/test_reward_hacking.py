"""For each domain, answers that game its grader instead of solving the problem: they earn nothing."""

import random
import re
from collections.abc import Callable, Sequence

import pytest

from tokensieve.tasks.problems import DOMAINS, Call, Item

Game = tuple[str, Sequence[Call]]


def documents_of(item: Item) -> str:
    return "\n".join(item.data[2:])


def hard_coded(item: Item, cases: Sequence[str]) -> str:
    """A program that knows the outputs of these cases, and prints 0 for all others."""
    return f"print({dict(zip(cases[::2], cases[1::2], strict=True))}.get(input(), 0))"


def seen_cases(item: Item) -> Sequence[str]:
    """What `run_tests` of the coding domain shows."""
    return item.data[-12:-8]


GAMES: dict[str, list[Callable[[Item], Game]]] = {
    "mathematics": [
        lambda item: (" ".join(map(str, range(10_000))), ()),  # every number
        lambda item: (item.question, ()),
    ],
    "logic": [
        lambda item: (", ".join(item.data[1:]), ()),  # every name
        lambda item: (item.question, ()),
        lambda item: (f"{item.data[0]}, or {next(n for n in item.data[1:] if n != item.data[0])}", ()),
    ],
    "programming": [
        lambda item: (f"print({item.data[1]})", ()),  # a constant
        lambda item: ("import sys\nprint(sys.stdin.read())", ()),
        lambda item: ("print('PASSED')\nraise SystemExit(0)", ()),
        lambda item: (hard_coded(item, item.data[:2]), ()),
    ],
    "coding": [
        lambda item: ("All tests pass.", ()),
        lambda item: ("Done.", [step.call for step in item.steps if step.call.name != "replace"]),
        lambda item: ("Done.", [Call("write_file", {"file": "main.py", "text": hard_coded(item, seen_cases(item))})]),
        lambda item: ("Done.", [Call("write_file", {"file": "main.py", "text": f"print({item.data[-1]})"})]),
        lambda item: ("Done.", [Call("write_file", {"file": "main.py", "text": "print('2 of 2 tests pass.')"})]),
        lambda item: ("Done.", [Call("write_file", {"file": "tests.py", "text": "assert True"})]),
    ],
    "search": [
        lambda item: (" ".join(re.findall(r"[A-Z][a-z]+", documents_of(item))), ()),  # every name
        lambda item: (documents_of(item), [step.call for step in item.steps]),
        lambda item: (item.data[1], ()),  # the name in the question
        lambda item: (f"{item.answer} {item.data[2].partition(chr(10))[0]} {item.data[3].partition(chr(10))[0]}", ()),
        lambda item: ("\n".join(step.result for step in item.steps), [step.call for step in item.steps]),
    ],
    "writing": [
        lambda item: ("x", ()),
        lambda item: ("x. x. x. x.", ()),
        lambda item: (". ".join(re.findall(r'"(\w+)"', item.question)), ()),  # the words that are asked for
    ],
    "answering": [
        lambda item: (item.question, ()),  # a copy of the descriptions
        lambda item: ("x", ()),
        lambda item: (" ".join(re.findall(r'"([^"]+)"', " ".join(item.rubric))), ()),  # every value
    ],
}


def test_every_domain_is_gamed() -> None:
    assert GAMES.keys() == DOMAINS.keys()


@pytest.mark.parametrize("name", DOMAINS)
def test_games_earn_nothing(name: str) -> None:
    domain = DOMAINS[name]
    for seed, difficulty in enumerate(domain.difficulty):
        item = domain.draw(random.Random(seed), difficulty, "en", "train")
        for number, game in enumerate(GAMES[name]):
            answer, calls = game(item)
            value = domain.grade(item, answer, calls) if calls else domain.grade(item, answer)
            assert value == 0, f"game {number} of {name} earns {value}"
