"""The problems of post-training: right answers are graded right, splits never meet, prompts are long enough."""

import importlib
import itertools
import random
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import pytest

import tokensieve
from tokensieve.config import UserError
from tokensieve.posttrain.outcomes import prompts_of
from tokensieve.tasks import Answer, encoder
from tokensieve.tasks.problems import DOMAINS, MODES, Item, Problem, Problems, problem, split_thinking
from tokensieve.tasks.turns import END_THINK, THINK

ALL = [(name, mode, language) for name in DOMAINS for mode in MODES for language in DOMAINS[name].languages]


@pytest.fixture(scope="module")
def encode():
    return encoder(tokensieve.load_tokenizer("base"))


@pytest.mark.parametrize(("name", "mode", "language"), ALL)
def test_the_demonstration_is_right_and_others_are_not(name: str, mode: str, language: str, encode) -> None:
    task = Problems(DOMAINS[name], encode, mode, language)
    least, _, most = DOMAINS[name].difficulty
    for size in (least, (least + most) // 2, most):
        for example in task.examples("train", 2, size):
            shown, bare = example.shown, example.item.answer
            right = task.score(example, shown)
            assert right.value == 1 and right.parts == {"ended": 1.0, "format": 1.0}, example.demonstration
            wrong = [
                replace(shown, ended=False),
                replace(shown, text=bare if mode == "think" else f"{THINK}so{END_THINK}{bare}"),
                replace(shown, text=f"{THINK}{example.demonstration}"[: -len(bare)]),
                replace(shown, text=""),
                Answer(""),
                Answer("?"),
            ]
            assert [task.score(example, answer).value for answer in wrong] == [0.0] * len(wrong)
    assert task.reward(example, shown) == 1


@pytest.mark.parametrize("name", DOMAINS)
def test_what_is_shown_is_right_in_every_phrasing(name: str) -> None:
    """Whatever is drawn: no phrasing of an answer holds a word that the answer must not state."""
    domain = DOMAINS[name]
    least, _, most = domain.difficulty
    draws = {"programming": 1, "coding": 1, "search": 5}.get(name, 25)  # the first two run programs
    for split, language, size in itertools.product(("train", "test"), domain.languages, range(least, most + 1)):
        rng = random.Random(f"{split} {language} {size}")
        for _ in range(draws):
            item = domain.draw(rng, size, language, split)
            calls = [[step.call for step in item.steps]] if item.steps else []
            assert domain.grade(item, item.answer, *calls) == 1, item


def test_grades_are_by_the_rule() -> None:
    rng = random.Random(1)
    item = DOMAINS["mathematics"].draw(rng, 2, "en", "train")
    grade, value = DOMAINS["mathematics"].grade, item.data[0]
    assert grade(item, f"She has {value}.") == 1 and grade(item, f"{value} or {int(value) + 1}") == 0
    assert grade(item, f"{int(value):,}") == 1 and grade(item, f"0{value}") == 1 and grade(item, f"-{value}") == 0
    item = DOMAINS["logic"].draw(rng, 4, "en", "train")
    right, *people = item.data
    other = next(name for name in people if name != right)
    grade = DOMAINS["logic"].grade
    assert grade(item, f"It is {right}.") == 1 and grade(item, other) == 0 and grade(item, f"{right} or {other}") == 0
    item = DOMAINS["programming"].draw(rng, 1, "en", "train")
    grade, program = DOMAINS["programming"].grade, item.answer
    bare = program.removeprefix("```python\n").removesuffix("\n```")
    assert grade(item, bare) == 1 and grade(item, f"Here it is:\n{program}\nIt reads the line.") == 1
    assert grade(item, f"{program}\n\n```python\nprint(1)\n```") == 0
    assert grade(item, f"print({item.data[1]})") == float(len({*item.data[1::2]}) == 1)
    for hostile in ("while True: pass", "import os; os._exit(0)", "raise SystemExit(0)", "print('x' * 10**7)"):
        assert grade(item, hostile) == 0


@pytest.mark.parametrize("name", DOMAINS)
def test_the_splits_share_no_problem_no_phrasing_and_no_seed(name: str, encode) -> None:
    seen: dict[str, list[Problem]] = {}
    for split in ("train", "test"):
        tasks = [Problems(DOMAINS[name], encode, mode, "en", tokens=600) for mode in MODES]
        seen[split] = [e for task in tasks for seed in (0, 1) for e in task.examples(split, 20, seed=seed)]
    keys = {split: {e.item.key for e in examples} for split, examples in seen.items()}
    assert keys["train"] and keys["test"] and not keys["train"] & keys["test"]
    # No sentence of one split, numbers and names taken out, is a sentence of the other: worked examples included.
    frames = {split: {frame for e in examples for frame in frames_of(e)} for split, examples in seen.items()}
    assert frames["train"] and frames["test"] and not frames["train"] & frames["test"]


def templates_of(value: Any) -> Iterator[tuple[str, str]]:
    """(split, text) of all phrasings below a constant: what stands under "train" or "test" in a table."""
    if isinstance(value, Mapping) and value.keys() == {"train", "test"}:
        yield from ((split, text) for split, below in value.items() for text in texts_of(below))
    elif isinstance(value, Mapping):
        yield from (found for below in value.values() for found in templates_of(below))
    elif isinstance(value, (tuple, list)):
        yield from (found for below in value for found in templates_of(below))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from (found for field in fields(value) for found in templates_of(getattr(value, field.name)))


def texts_of(value: Any) -> Iterator[str]:
    yield from (value,) if isinstance(value, str) else (text for below in value for text in texts_of(below))


@pytest.mark.parametrize("name", DOMAINS)
def test_no_template_is_in_both_splits(name: str) -> None:
    module = importlib.import_module(type(DOMAINS[name]).__module__)
    found = [pair for constant, value in vars(module).items() if constant.isupper() for pair in templates_of(value)]
    texts = {split: {text for its, text in found if its == split} for split in ("train", "test")}
    assert len(texts["train"]) >= len(texts["test"]) > 1 and not texts["train"] & texts["test"]


@pytest.mark.parametrize("name", DOMAINS)
def test_no_seed_and_no_worked_example_is_in_both_splits(name: str, encode, monkeypatch) -> None:
    """Every generator that is made, and every item that is asked or shown, over several sizes, modes and seeds."""
    seeds: dict[str, set[str]] = {"train": set(), "test": set()}
    items: dict[str, set[str]] = {"train": set(), "test": set()}
    for split in ("train", "test"):
        monkeypatch.setattr(problem.random, "Random", partial(recorded, seeds[split]))
        for mode, size, seed in itertools.product(MODES, DOMAINS[name].difficulty[:2], (0, 1)):
            task = Problems(DOMAINS[name], encode, mode, tokens=600)
            show = partial(shown_too, items[split], task._worked)
            object.__setattr__(task, "_worked", show)  # the task is frozen
            items[split] |= {example.item.key for example in task.examples(split, 3, size, seed)}
    assert len(seeds["train"]) == len(seeds["test"]) >= 4 and not seeds["train"] & seeds["test"]
    assert len(items["train"]) > 12 and len(items["test"]) > 12 and not items["train"] & items["test"]


def shown_too(keys: set[str], worked: Callable[[Item], list[str]], item: Item) -> list[str]:
    keys.add(item.key)
    return worked(item)


def recorded(seeds: set[str], seed: str, make: type = random.Random) -> random.Random:
    seeds.add(seed)
    return make(seed)


def frames_of(example: Problem) -> set[str]:
    """The question's sentences without what is drawn: capitalized words, numbers and goods."""
    goods = ("apples", "books", "coins", "shells", "stamps")
    sentences = example.item.question.replace("?", ".").split(".")
    found = set()
    for sentence in sentences:
        words = [word.strip(string.punctuation) for word in sentence.split()]
        kept = [
            w for place, w in enumerate(words) if not w.isdigit() and w not in goods and (place == 0 or w.islower())
        ]
        kept = kept[1:] if kept and kept[0] in {"Ana", "Ben", "Cara", "Dev", "Eli", "Fay", "Gus", "Ida", "Jon", "Kim",
                                                 "Lea", "Max"} else kept  # fmt: skip
        if kept:
            found.add(" ".join(kept))
    return found


@pytest.mark.parametrize(("name", "mode", "language"), ALL)
def test_prompts_are_as_long_as_asked_and_never_show_what_they_ask(name, mode, language, encode) -> None:
    task = Problems(DOMAINS[name], encode, mode, language, tokens=1500)
    for example in task.examples("test", 3):
        (ids,) = prompts_of([example], encode)["prompt"]
        assert 1500 <= len(ids) < 1500 + 800  # an episode of a search in Chinese has up to 600
        roles, texts = zip(*((message["role"], message["content"]) for message in example.prompt), strict=True)
        assert roles == ("user", "assistant") * (len(roles) // 2) + ("user",)
        assert texts[-1] == example.item.question and texts[-1] not in "\n".join(texts[:-1])
        assert all(text.startswith(THINK) == (mode == "think") for text in texts[1::2])


def test_the_same_arguments_give_the_same_problems(encode) -> None:
    for name, (mode, seed) in itertools.product(DOMAINS, (("think", 0), ("direct", 3))):
        tasks = [Problems(DOMAINS[name], encode, mode, tokens=300) for _ in range(2)]
        assert tasks[0].examples("train", 4, seed=seed) == tasks[1].examples("train", 4, seed=seed)
        assert tasks[0].examples("train", 4, seed=seed) != tasks[0].examples("train", 4, seed=seed + 1)


@pytest.mark.parametrize(
    ("text", "thoughts", "answer"),
    [
        ("<think>so</think>42", "so", "42"),
        ("so</think> 42 ", "so", "42"),  # the prompt opened the thoughts
        ("</think>42", "", "42"),
        ("42", None, "42"),
        ("<think>never ends", "never ends", ""),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
    ],
)
def test_thoughts_and_answer(text: str, thoughts: str | None, answer: str) -> None:
    assert split_thinking(text) == (thoughts, answer)


def test_what_is_refused(encode) -> None:
    with pytest.raises(UserError, match="mode 'aloud' is unknown; use one of think, direct"):
        Problems(DOMAINS["logic"], encode, "aloud")
    with pytest.raises(UserError, match="logic has no problems in language 'de'; use one of en, zh"):
        Problems(DOMAINS["logic"], encode, language="de")
    german = replace(DOMAINS["logic"], languages=("de",))
    with pytest.raises(UserError, match="logic: no prompts are worded in language 'de'; use one of en, zh"):
        Problems(german, encode, language="de")
    with pytest.raises(UserError, match="mathematics has difficulties from 1 to 12, not 13"):
        Problems(DOMAINS["mathematics"], encode).examples("train", 1, 13)
