"""Answers in general form: equal values are equal however they are written, and no answer is worked on for ever."""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from tokensieve.config import UserError
from tokensieve.tasks.problems import expressions
from tokensieve.tasks.problems.expressions import Expressions, is_expression


@pytest.fixture(scope="module")
def compared() -> Expressions:
    return Expressions()


EQUAL = [
    ("1/2", "0.5"),
    ("1/2", r"So it is $\frac{2}{4}$."),
    (r"\frac{\sqrt{3}}{2}", r"First 3, then \boxed{\sqrt{3}/2}"),
    ("42", "41\nThe answer is 42."),
    ("1,234", "1234"),
    (r"x^2+1", "1 + x^2"),
    (r"\{1,2\}", r"$\{2, 1\}$"),
    ("5", "x = 5"),
    ("50%", "0.5"),
    ("1024", "2^{10}"),
]
DIFFERENT = [
    ("42", ""),
    ("42", "forty-two"),
    ("42", "42\nNo, 41."),
    ("42", "41, 42"),
    ("42", r"\boxed{41} or \boxed{43}"),
    ("2", r"2\sqrt{3}"),
    ("3", "3x"),
    ("2", "2^{10}"),
    ("(1,2)", "(2,1)"),
    ("1/3", "0.33"),
    ("x^2", r"\boxed{" * 200),
    ("42", "\ud800 \0 $\\frac{$"),
]


def test_values_are_compared_and_not_texts(compared: Expressions) -> None:
    assert [pair for pair in EQUAL if not compared.equal(pair[1], pair[0])] == []
    assert [pair for pair in DIFFERENT if compared.equal(pair[1], pair[0])] == []


@pytest.mark.parametrize("answer", ["9**9**9**9", "$9^{9^{9^9}}$", r"\boxed{(x+y+z+w)^{999}}", r"$(10^{9})!$"])
def test_no_answer_is_worked_on_for_ever(answer: str) -> None:
    """In a thread too, and the next answer is judged as ever."""
    compared, verdicts = Expressions(seconds=0.5), []
    begin = time.monotonic()
    thread = threading.Thread(target=lambda: verdicts.append(compared.equal(answer, "42")))
    thread.start()
    thread.join(30)
    assert verdicts == [False] and time.monotonic() - begin < 15
    late = Expressions.equal(compared, "6 * 7", "42")
    assert late is True


def test_its_process_ends_alone_if_nobody_waits_any_more() -> None:
    """As after a kill of its parent, in the middle of a comparison that would take hours."""
    code = "from tokensieve.tasks.problems import expressions_worker as w; w.LONGEST = 1; w.main()"
    asked = json.dumps({"right": r"\boxed{42}", "answer": "$9^{9^{9^9}}$"})
    worker = subprocess.run(
        [sys.executable, "-c", code], input=f"{asked}\n", text=True, capture_output=True, timeout=60
    )
    assert worker.returncode == -signal.SIGALRM and worker.stdout == "ready\n"


def test_its_process_ends_with_it() -> None:
    compared = Expressions()
    assert compared.equal("1.0", "1")
    process = compared._process
    assert process is not None and process.poll() is None
    del compared
    assert process.poll() is not None


def test_what_is_mathematics() -> None:
    assert all(map(is_expression, ("42", r"\frac12", "x^2+1", r"12\text{ cm}", "$5$", r"2\sin(x)")))
    assert not any(map(is_expression, ("B", "Paris", "12 cm", "三", "", "the 4th")))


def test_without_math_verify_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="compared by math-verify; install it with: pip install"):
        Expressions()
