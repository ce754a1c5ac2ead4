"""Codeforces: which rows are asked, verdicts of the sandbox, and answers that are kept when the endpoint breaks."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tokensieve.evals.endpoint as endpoint
from tests.support.endpoints import answering, said
from tests.support.harness_files import codeforces as row
from tests.support.harness_files import write_lines
from tokensieve.config import UserError
from tokensieve.evals.paper import BY_KEY, codeforces
from tokensieve.evals.paper.asking import Asked
from tokensieve.evals.paper.harnesses import Unavailable
from tokensieve.paper_config import PaperConfig

RIGHT = "Thoughts: ```python\nprint(0)\n```\nNow:\n```python\na, b = map(int, input().split())\nprint(a + b)\n```"
BENCHMARK = BY_KEY["codeforces"]


@pytest.mark.parametrize(
    "more",
    [
        {"contest_name": "Codeforces Round 990 (Div. 2)"},
        {"rating": None},
        {"input_mode": "file"},
        {"interaction_format": "Ask."},
        {"generated_checker": "import sys"},
        {"official_tests_complete": False},
        {"official_tests": []},
    ],
)
def test_rows_that_cannot_be_judged_are_left_out(more: dict[str, Any]) -> None:
    assert len([*codeforces.select([row(), row(id="1/B") | more])]) == 1


def test_a_problems_text_and_rows_of_another_format() -> None:
    (problem,) = codeforces.select([row()])
    for part in ("Sum", "Add two numbers.", "Input:\nTwo integers.", "1 2", "Note:\nMind the sign."):
        assert part in problem.message
    assert "256 MB" in problem.message and problem.rating == 1200 and "-4 1" not in problem.message
    with pytest.raises(Unavailable, match="row 0 is not one of open-r1/codeforces: KeyError"):
        [*codeforces.select([{"question": "?"}])]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (RIGHT, 1.0),
        ("```\nprint(3)\n```", 0.0),  # right for the first test alone
        ("```python\nwhile True: pass\n```", 0.0),
        ("```python\nprint(sum(map(int, input().split())), end='  \\n\\n')\n```", 1.0),
        ("The sum is a + b.", 0.0),
    ],
)
def test_verdicts(answer: str, score: float) -> None:
    (problem,) = codeforces.select([row(time_limit=0.1)])
    assert codeforces.grade(problem, answer) == score


def ask(url: str, folder: Path, **more: Any) -> list[tuple[str, float | None, int | None]]:
    config = replace(PaperConfig(data=str(folder / "data"), retries=0, at_once=1), **more)
    found = codeforces.run(BENCHMARK, config, Asked(url, "m", 100, 2, print), folder / "out")
    return sorted((answer.problem, answer.score, answer.tokens) for answer in found)


@pytest.mark.parametrize(
    ("thoughts", "content", "score"),
    [("Perhaps ```python\nprint(3)\n", RIGHT, 1.0), (RIGHT, "", 0.0), (RIGHT, None, 0.0)],
)
def test_thoughts_are_not_graded(tmp_path: Path, thoughts: str, content: str | None, score: float) -> None:
    """Neither a fence that they leave open nor a draft in them counts."""
    write_lines(tmp_path / "data/codeforces/test.jsonl", [row()])
    reply = said("")
    reply["choices"][0]["message"] |= {"reasoning_content": thoughts, "content": content}
    with answering(lambda *_: (200, reply)) as url:
        assert [graded for _, graded, _ in ask(url, tmp_path)] == [score, score]


def test_a_run_is_resumed_where_the_endpoint_broke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint.time, "sleep", lambda _: None)
    rows = [row("1/A"), row("2/A", 1500), row("3/A", 900, contest_name="Educational Round")]
    write_lines(tmp_path / "data/codeforces/test.jsonl", rows)
    bodies: list[dict[str, Any]] = []
    good = 2

    def answer(_: str, body: dict[str, Any]) -> tuple[int, Any]:
        bodies.append(body)
        return (200, said(RIGHT, tokens=40)) if len(bodies) <= good else (200, b"nonsense")

    with answering(answer) as url:
        with pytest.raises(UserError, match="no JSON"):
            ask(url, tmp_path)
        file = tmp_path / "out" / "answers.jsonl"
        assert len(file.read_text().splitlines()) == 2
        file.write_text(file.read_text() + '{"number": 0, "prob')  # as a kill would leave it
        bodies, good = [], 2
        whole = ask(url, tmp_path)
    assert whole == [("1/A", 1.0, 40), ("1/A", 1.0, 40), ("2/A", 1.0, 40), ("2/A", 1.0, 40)]
    assert len(bodies) == 2 and all(body["temperature"] == 1.0 and body["top_p"] == 0.95 for body in bodies)
    assert [json.loads(line)["level"] for line in file.read_text().splitlines()].count(1500) == 2


@pytest.mark.parametrize("at_once", [1, 3])
def test_no_more_is_asked_once_a_request_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Twelve are waiting, and those that are being answered are kept."""
    monkeypatch.setattr(codeforces, "grade", lambda *_: 1.0)
    write_lines(tmp_path / "data/codeforces/test.jsonl", [row(f"{i}/A") for i in range(6)])
    bodies: list[dict[str, Any]] = []

    def answer(_: str, body: dict[str, Any]) -> tuple[int, Any]:
        bodies.append(body)
        return (401, {}) if len(bodies) == at_once else (200, said(RIGHT))

    with answering(answer) as url, pytest.raises(UserError, match="another API key"):
        ask(url, tmp_path, at_once=at_once)
    kept = len((tmp_path / "out" / "answers.jsonl").read_text().splitlines())
    assert kept == len(bodies) - 1 and at_once <= len(bodies) < 12


def test_a_request_that_is_refused_or_late_has_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have, and a later run asks for it again; an endpoint that is silent throughout is asked no more."""
    monkeypatch.setattr(codeforces, "grade", lambda *_: 1.0)
    write_lines(tmp_path / "data/codeforces/test.jsonl", [row(f"{i:02}/A", description=f"No. {i}.") for i in range(12)])
    bodies: list[dict[str, Any]] = []
    over = threading.Event()

    def answer(_: str, body: dict[str, Any]) -> tuple[int, Any]:
        bodies.append(body)
        content = body["messages"][0]["content"]
        if "No. 0." in content:
            return 400, {}
        if "No. 5." in content:
            over.wait(60)
        return 200, said(RIGHT)

    with answering(answer) as url:
        found = ask(url, tmp_path, seconds=1.0, at_once=2)
        over.set()
        assert {place for place, score, _ in found if score is None} == {"00/A", "05/A"} and len(found) == 24
        bodies.clear()
        assert sum(score is None for _, score, _ in ask(url, tmp_path)) == 2 and len(bodies) == 4
    bodies.clear()
    with answering(lambda _, body: bodies.append(body) or (400, {})) as url:
        with pytest.raises(Unavailable, match="400"):
            ask(url, tmp_path / "again", at_once=1, data=str(tmp_path / "data"))
    assert codeforces.SILENT < len(bodies) < 24


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the thread shows it too
def test_an_error_of_our_own_is_raised() -> None:
    before = threading.enumerate()
    with pytest.raises(ZeroDivisionError):
        codeforces._begun(lambda: 1 // 0).result(60)
    for thread in [thread for thread in threading.enumerate() if thread not in before]:
        thread.join()


def test_an_interrupt_ends_a_run_before_the_answers_that_are_on_their_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "data/codeforces/test.jsonl", [row(f"{i}/A") for i in range(6)])
    interrupted, bodies = threading.Event(), []

    def answer(_: str, body: dict[str, Any]) -> tuple[int, Any]:
        bodies.append(body)
        if len(bodies) > 2:
            interrupted.wait(60)
        return 200, said(RIGHT)

    def grade(*_: Any) -> float:
        if len(graded) == 1:
            raise KeyboardInterrupt
        graded.append(1)
        return 1.0

    graded: list[int] = []
    monkeypatch.setattr(codeforces, "grade", grade)
    with answering(answer) as url:
        before = threading.enumerate()
        try:
            with pytest.raises(KeyboardInterrupt):
                ask(url, tmp_path, at_once=2)
            assert len(bodies) <= 4
            assert all(thread.daemon for thread in threading.enumerate() if thread not in before)  # nor at exit
        finally:
            interrupted.set()
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 1


def test_what_cannot_run_says_why(tmp_path: Path) -> None:
    write_lines(tmp_path / "data/codeforces/test.jsonl", [row(rating=None)])
    with answering(lambda *_: (404, {})) as url:
        with pytest.raises(Unavailable, match="no problem of a Div. 1 contest"):
            ask(url, tmp_path)
        write_lines(tmp_path / "data/codeforces/test.jsonl", [row()])
        with pytest.raises(Unavailable, match="404"):
            ask(url, tmp_path)
        (tmp_path / "data/codeforces/test.jsonl").write_text("{")
        with pytest.raises(Unavailable, match="cannot be read"):
            ask(url, tmp_path)
        (tmp_path / "data/codeforces/test.jsonl").unlink()
        with pytest.raises(Unavailable, match="cannot be read"):  # of the hub, offline
            ask(url, tmp_path, data="")
