"""Domains of a user's own: rows of files and objects of modules, under the contract of the built-in ones."""

import itertools
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest

import tokensieve
from tokensieve.config import UserError
from tokensieve.posttrain.outcomes import demonstrations_of, reward_of
from tokensieve.tasks import Answer, Example, Score, encoder
from tokensieve.tasks.problems import DOMAINS, MODES, Problems, domain
from tokensieve.tasks.problems.problem import split_of
from tokensieve.tasks.problems.rows import key_of
from tokensieve.tasks.turns import END_THINK, THINK

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Kenya": "Nairobi",
            "Peru": "Lima", "Cuba": "Havana", "Chad": "N'Djamena", "Iraq": "Baghdad", "Oman": "Muscat"}  # fmt: skip
ROWS = [{"prompt": f"The capital of {c}?", "answer": a, "thoughts": f"{c}: {a}.", "id": 7} for c, a in CAPITALS.items()]
RUBRIC = ["The answer has exactly 1 sentences.", 'The answer uses the word "sea".']


@pytest.fixture(scope="module")
def encode():
    return encoder(tokensieve.load_tokenizer("base"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def written(rows: Sequence[Any], name: str = "own.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(tmp_path / name)

    return written


def keys(name: str, encode: Any, **options: Any) -> dict[str, set[str]]:
    task = Problems(domain(name), encode, **options)
    return {split: {e.item.key for e in task.examples(split, 60)} for split in ("train", "test")}


def test_rows_are_problems(write, encode) -> None:
    name = write(ROWS)
    for mode in MODES:
        task = Problems(domain(name), encode, mode, tokens=300)
        assert task.name == f"own-{mode}"
        for example in task.examples("train", 4):
            assert len(encode.prompt(example.prompt)) >= 300
            assert task.reward(example, Answer(example.demonstration)) == 1
            assert task.reward(example, Answer(example.demonstration, ended=False)) == 0
    seen = keys(name, encode)
    assert seen["train"] and seen["test"] and not seen["train"] & seen["test"]
    assert len(seen["train"] | seen["test"]) == len(ROWS)


def test_a_prompt_is_in_one_split_however_often_it_is_there(write, encode) -> None:
    """And in whatever order the rows come, with other capitals and spaces."""
    again = [{"prompt": row["prompt"].upper().replace(" ", "  "), "answer": "else"} for row in ROWS]
    first, second = keys(write(ROWS), encode), keys(write([*again, *reversed(ROWS)]), encode)
    assert first == second


def test_files_of_datasets(tmp_path: Path, write, encode) -> None:
    made = datasets.Dataset.from_list(ROWS)
    made.to_parquet(tmp_path / "own.parquet")
    made.save_to_disk(tmp_path / "own")
    expected = keys(write(ROWS), encode)
    assert keys(str(tmp_path / "own.parquet"), encode) == expected == keys(str(tmp_path / "own"), encode)
    datasets.DatasetDict({"train": made, "dev": made}).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match=r"a dataset of several splits \(train, dev\); name one: .*both/SPLIT"):
        domain(str(tmp_path / "both"))
    assert keys(str(tmp_path / "both" / "train"), encode)["test"]


def test_answers_are_graded_by_their_end(write, encode) -> None:
    task = Problems(domain(write(ROWS)), encode)
    example = task.examples("train", 1)[0]
    right = example.item.answer
    for text in (right, right.lower(), f"Hm.\n  **{right}.**\n", f"It is \\boxed{{{right}}}, I think."):
        assert task.reward(example, Answer(text)) == 1, text
    for text in ("", "...", f"{right} or Oslo", f"{right}\nOslo", f"\\boxed{{{right}}} \\boxed{{Oslo}}"):
        assert task.reward(example, Answer(text)) == 0, text


def test_mathematical_answers_are_graded_by_value(write, encode) -> None:
    rows = [{"question": f"Half of {n}?", "answer": [f"\\frac{{{n}}}{{2}}", "half"]} for n in range(1, 41)]
    task = Problems(domain(write(rows)), encode)
    example = task.examples("train", 1)[0]
    n = int(example.item.question.split()[2].strip("?"))
    assert task.reward(example, Answer(f"So it is ${n / 2}$")) == 1 == task.reward(example, Answer("Half"))
    assert task.reward(example, Answer(f"So it is ${n}$")) == 0


@pytest.mark.parametrize(
    ("right", "equal", "others"),
    [
        ("5", ["5.", "**5.**", "`5`", "$5$", "5。"], [".5", "5!", "-5"]),
        ("5!", ["5!", "120", "**5!**"], ["5"]),
        (".5", ["0.5", ".5."], ["5"]),
        ("f'", ["f'", "F'."], ["f", "f!"]),
        ("n!", ["n!", "$n!$"], ["n"]),
        ("2x", ["2x", "2 x"], ["2", "2x!"]),
        ("B", ["b", "B.", "**B**"], ["B'", "A"]),
        ("Rome", ["rome!", "'Rome'", '"Rome."'], ["Romes"]),
        ("金", ["金！", " 金 "], ["银"]),
    ],
)
def test_signs_of_mathematics_are_no_punctuation(right: str, equal: list[str], others: list[str], write) -> None:
    found = domain(write([{"prompt": f"Case {n}?", "answer": right} for n in range(20)]))
    item = found.draw(random.Random(0), 1, "en", "train")
    assert [text for text in equal if found.grade(item, text) != 1] == []
    assert [text for text in others if found.grade(item, text) != 0] == []


def test_numbers_of_any_kind_and_levels(write, encode) -> None:
    rows = [{"prompt": f"{n} + 1?", "answer": n + 1, "difficulty": 1 + n % 3} for n in range(40)]
    found = domain(write(rows))
    assert found.difficulty == (1, 2, 3)
    for size in (1, 3):
        asked = {e.item.question for e in Problems(found, encode).examples("test", 80, size)}
        assert {1 + int(text.split()[0]) % 3 for text in asked} == set(range(1, size + 1))


@pytest.mark.parametrize("alone", ["train", "test"])
def test_a_difficulty_is_one_at_which_both_splits_have_rows(alone: str, write, encode) -> None:
    """Or a specialist would be trained, and nothing could be asked to measure it."""
    splits = {n: split_of("own", key_of(f"{n} + 1?")) for n in range(20)}
    rows = [{"prompt": f"{n} + 1?", "answer": n + 1, "difficulty": 1 if splits[n] == alone else 3} for n in splits]
    found = domain(write([*rows, {"prompt": "20 + 1?", "answer": 21, "difficulty": 4}]))
    assert found.difficulty == (3, 4, 4)
    for level, split in itertools.product((3, 4), ("train", "test")):
        assert Problems(found, encode).examples(split, 9, level)


def test_rubrics_are_graded_by_rules_or_by_a_judge_alone(write, encode) -> None:
    rows = [{"prompt": f"Write about island {n}.", "rubric": RUBRIC} for n in range(20)]
    task = Problems(domain(write(rows)), encode)
    example = task.examples("train", 1)[0]
    assert task.reward(example, Answer("The sea.")) == 1 and task.reward(example, Answer("The sea. So.")) == 0.5
    with pytest.raises(UserError, match="own has no other answers in its train split to show as worked examples"):
        Problems(domain(write(rows)), encode, tokens=600).examples("train", 1)
    with pytest.raises(UserError, match="no example has a right answer to show, so there is no cold start"):
        demonstrations_of([example], encode)

    task = Problems(domain(write([row | {"rubric": ["It is moving."]} for row in rows])), encode)
    example = task.examples("train", 1)[0]
    with pytest.raises(UserError, match=r"no rule checks the rubric 'It is moving.'; a language model has to judge it"):
        task.reward(example, Answer("The sea."))

    class Kind:
        def scores(self, asked: Sequence[Any]) -> list[float | None]:
            return [0.5 for _ in asked]

    rewards = reward_of(task, [example], encode, judge=Kind())
    ended = [*encode("The sea."), next(iter(encode.ends))]
    assert rewards([ended, encode("The sea.")], [0, 0]) == [1.5, 0.5]  # the second does not end


GOOD = {"prompt": "Why?", "answer": "So."}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "row 1 is not an object with fields"),
        ({"answer": "So."}, 'row 1 has no prompt; give it a "prompt"'),
        (GOOD | {"prompt": "  "}, "row 1 has no prompt"),
        (GOOD | {"prompt": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "has no prompt"),
        ({"prompt": "Why?", "answer": " "}, 'row 1 has nothing to grade by; give it an "answer" or a "rubric"'),
        (GOOD | {"answer": {"value": 1}}, "row 1: an answer is dict; give a text, a number, or a list of them"),
        (GOOD | {"answer": True}, "row 1: an answer is bool"),
        (GOOD | {"rubric": "be nice"}, "row 1: a rubric is a list of criteria, each of them a text"),
        (GOOD | {"rubric": ["be nice", " "]}, "row 1: a rubric is a list"),
        (GOOD | {"language": "de"}, "row 1: language 'de' is unknown; use one of en, zh"),
        (GOOD | {"difficulty": 0}, "row 1: difficulty is 0; it is a whole number from 1 on"),
        (GOOD | {"thoughts": 3}, "row 1: thoughts are no text"),
        (GOOD | {"answer": float("nan")}, "row 1: an answer is nan, as tables write one that is missing"),
        (GOOD | {"answer": [1, float("inf")]}, "row 1: an answer is inf"),
        (GOOD | {"prompt": "Why\ud800?"}, "row 1 holds half of a surrogate pair"),
        (GOOD | {"answer": ["So.", "\udfff"]}, "row 1 holds half of a surrogate pair"),
        (GOOD | {"rubric": ["It is \ud800."]}, "row 1 holds half of a surrogate pair"),
        (GOOD, "has 1 rows in language en, and none is in the (train|test) split"),
    ],
)
def test_rows_of_another_form_are_refused(row: Any, message: str, write) -> None:
    with pytest.raises(UserError, match=message):
        domain(write([row]))


def test_files_that_are_none_are_refused(tmp_path: Path, write) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1\n')
    (tmp_path / "bytes.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "a.csv").write_text("prompt,answer\n")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("bad.jsonl", "bad.jsonl line 1 is not JSON"),
        ("bytes.jsonl", r"bytes.jsonl is not UTF-8 \(byte 12\)"),
        ("bad.parquet", "bad.parquet is damaged or cannot be read"),
        ("a.csv", "a domain's file is .jsonl, .ndjson, .parquet, or a folder"),
        ("folder", "folder is no folder that datasets.save_to_disk wrote"),
        ("none.jsonl", "none.jsonl: there is no such domain or file"),
    ):
        with pytest.raises(UserError, match=message):
            domain(str(tmp_path / name))
    for name, message in (
        (write([], "empty.jsonl"), "empty.jsonl has no rows"),
        (write(ROWS, "logic.jsonl"), "would be called 'logic', as one that is there"),
        ("logics", "domain logics: there is no such domain or file; name one of mathematics, logic"),
    ):
        with pytest.raises(UserError, match=message):
            domain(name)
    assert domain("logic") is DOMAINS["logic"]


class Doubling:
    """A task that knows nothing of post-training."""

    name = "doubling"

    def examples(self, split: str, count: int, difficulty: int | None = None, seed: int = 0) -> list[Example]:
        return [Example(name=f"n{seed % 50}", prompt=f"Twice {seed % 50}?")] * count

    def score(self, example: Example, answer: Answer) -> Score:
        return Score(float(answer.text == str(2 * int(example.name[1:]))))

    def reward(self, example: Example, answer: Answer) -> float:
        return self.score(example, answer).value


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType("of_a_user")
    made.doubling, made.Doubling, made.logic, made.nothing = Doubling(), Doubling, DOMAINS["logic"], 3
    made.tokens = type("T", (Doubling,), {"examples": lambda *_: [Example(name="a", prompt=[1, 2])]})()
    made.up = type("T", (Doubling,), {"name": "../up"})()
    monkeypatch.setitem(sys.modules, "of_a_user", made)
    return made


def test_objects_of_modules(module: ModuleType, encode) -> None:
    task = Problems(domain("of_a_user:doubling"), encode, "think")
    example = task.examples("train", 1)[0]
    twice = 2 * int(example.item.question.split()[1].strip("?"))
    assert task.reward(example, Answer(f"{THINK}so{END_THINK}{twice}")) == 1
    assert task.reward(example, Answer(str(twice))) == 0 == task.reward(example, Answer(f"{THINK}so{END_THINK}1"))
    seen = keys("of_a_user:doubling", encode)
    assert seen["train"] and seen["test"] and not seen["train"] & seen["test"]
    module.logic = type("Logic", (), {n: getattr(DOMAINS["logic"], n) for n in ("languages", "difficulty", "draw")})()
    module.logic.name, module.logic.grade = "order", DOMAINS["logic"].grade
    assert domain("of_a_user:logic") is module.logic
    for name, message in (
        ("of_a_user:Doubling", "Doubling is a class; name an object of it"),
        ("of_a_user:nothing", r"nothing is neither a Domain \(name, .*grade\) nor a Task"),
        ("of_a_user:none", "module of_a_user has no none"),
        ("of_a_user:up", "its name is '../up', and folders have it; use letters"),
        ("of_no_user:task", "there is no module of_no_user; is it on PYTHONPATH"),
    ):
        with pytest.raises(UserError, match=message):
            domain(name)
    with pytest.raises(UserError, match="task doubling: example a has another prompt than one text"):
        Problems(domain("of_a_user:tokens"), encode).examples("train", 1)


@pytest.mark.parametrize("grade", [float("nan"), 7.0, -1.0, None, "1"])
def test_a_grade_that_is_none_is_refused_by_its_domain(module: ModuleType, encode, grade: Any) -> None:
    module.doubling = type("T", (Doubling,), {"score": lambda *_: Score(grade)})()
    task = Problems(domain("of_a_user:doubling"), encode)
    with pytest.raises(UserError, match=r"doubling grades an answer .*; a grade is a number from 0 to 1"):
        task.score(task.examples("train", 1)[0], Answer("4"))


def test_a_problem_that_is_no_text_is_refused_by_its_domain(module: ModuleType, encode) -> None:
    def examples(*_: Any) -> list[Example]:
        return [Example(name=f"n{number}", prompt=f"\ud800 {number}") for number in (next(count),)]

    count = itertools.count()
    module.doubling = type("T", (Doubling,), {"examples": examples})()
    with pytest.raises(UserError, match="doubling has a problem with half of a surrogate pair; leave it out"):
        Problems(domain("of_a_user:doubling"), encode).examples("train", 1)
