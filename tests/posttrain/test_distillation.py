"""From a specialist's answers to data: what is kept, what is left out, and what takes its place."""

import json
from pathlib import Path
from typing import Any

import pytest

import tokensieve
from tokensieve.config import UserError
from tokensieve.posttrain import distillation
from tokensieve.posttrain.groups import Group
from tokensieve.posttrain_config import DistillConfig, SftConfig
from tokensieve.tasks import encoder
from tokensieve.tasks.problems import Problems, domain


def settings(**changes: Any) -> DistillConfig:
    return DistillConfig(**{"prompts": 1, "samples": 1, "keep": 3, "train": SftConfig(1, 1)} | changes)


def line(problem: str, text: str, score: float = 1.0, group: str = "logic-direct") -> dict[str, Any]:
    return {
        "group": group,
        "problem": problem,
        "score": score,
        "prompt": [1, 2],
        "answer": [3, 4, 5],
        "written": [1, 0, 1],
        "text": text,
    }


def test_passed_answers_no_two_alike_and_many_problems_first() -> None:
    lines = [line("a", "x"), line("a", "x "), line("a", "y"), line("a", "z", 0.9), line("b", "x"), line("c", "q", 0.0)]
    found = [(kept["problem"], kept["text"]) for kept in distillation.chosen(lines, settings())]
    assert found == [("a", "x"), ("b", "x"), ("a", "y")]
    assert len(distillation.chosen(lines, settings(keep=1))) == 1
    assert len(distillation.chosen(lines, settings(keep=9, passing=0.9))) == 4


@pytest.fixture(scope="module")
def group() -> Group:
    task = Problems(domain("logic"), encoder(tokensieve.load_tokenizer("base")), "direct", tokens=50)
    return Group("logic", "direct", (task,), 3)


def test_demonstrations_fill_up_only_if_asked(group: Group) -> None:
    lines = [line("a", "x"), line("b", "y", 0.0), line("a", "x", group="logic-think")]
    rows, kept, counts = distillation.training_rows([group], lines, settings(), group.task.encode, 0)
    assert rows.to_list() == [{"input_ids": [1, 2, 3, 4, 5], "completion_mask": [0, 0, 1, 0, 1]}] and kept == lines[:1]
    assert counts == {"logic-direct": {"sampled": 2, "passed": 1, "kept": 1, "demonstrations": 0}}
    filled = settings(fill="demonstrations")
    rows, kept, counts = distillation.training_rows([group], lines, filled, group.task.encode, 0)
    assert len(rows) == 3 and len(kept) == 1 and counts["logic-direct"]["demonstrations"] == 2
    with pytest.raises(UserError, match=r"no answer of a specialist scores 1.0 or more; train the specialists longer"):
        distillation.training_rows([group], lines[1:2], settings(), group.task.encode, 0)


def test_smaller_groups_are_repeated_until_all_weigh_the_same() -> None:
    rows = [[{"input_ids": [10 * group + row]} for row in range(count)] for group, count in enumerate((5, 2, 0, 1))]

    def found(repeat: int) -> list[int]:
        return [row["input_ids"][0] for row in distillation.balanced(rows, repeat)]

    assert found(1) == [0, 1, 2, 3, 4, 10, 11, 30]
    assert found(3) == [0, 1, 2, 3, 4, 10, 11, 10, 11, 10, 30, 30, 30]
    assert distillation.balanced([], 2) == []
    with pytest.raises(UserError, match=r"distill.repeat is 0; it must be at least 1"):
        settings(repeat=0)


def test_lines_on_disk(tmp_path: Path) -> None:
    file = tmp_path / "answers" / "logic.jsonl"
    distillation.write_lines(file, [line("a", "答")])
    assert distillation.read_lines(file) == [line("a", "答")] and "答" in file.read_text(encoding="utf-8")
    wrong = (
        {"group": "x"},
        [1],
        {"written": [1, 0]},
        {"written": [1, 0, 2]},
        {"answer": [3, "4", 5]},
        {"prompt": None},
    )
    for change in wrong:
        bad = change if change in wrong[:2] else line("a", "x") | change
        file.write_text(f"{json.dumps(line('a', 'x'))}\n{json.dumps(bad)}\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"logic.jsonl:2: no answer of a specialist; remove the file"):
            distillation.read_lines(file)
    distillation.check_tokens([line("a", "x")], 6)
    for change, vocabulary in (({}, 5), ({"prompt": [-1, 2]}, 6)):
        with pytest.raises(UserError, match=r"an answer in logic-direct has token (5|-1), and .* another tokenizer"):
            distillation.check_tokens([line("a", "x") | change], vocabulary)
