"""Mathematical answers in general form: whether an answer and a right one are the same expression, by math-verify.

math-verify reads numbers and LaTeX and compares them with SymPy, which a short answer can keep busy for ever, or fill
the memory with (9^{9^{9^9}}). So it works in a process of its own, which is killed when an answer takes too long.
"""

import importlib.util
import json
import re
import subprocess
import sys
import threading
import weakref
from typing import Any

from tokensieve.config import UserError
from tokensieve.tasks.problems import expressions_worker

LONGEST = 500  # characters of an answer that are read
WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sin|cos|tan|log|ln|exp|sqrt|pi|oo)(?![A-Za-z]))[^\W\d_]{2,}")
WHOLE = re.compile(r"-?[0-9]{1,50}")
BOXED = r"\boxed{"


class Expressions:
    """Compares answers, each within `seconds`. UserError if math-verify is not installed, or does not start.

    Safe in every thread; the threads wait for each other.
    """

    def __init__(self, seconds: float = 2.0):
        if importlib.util.find_spec("math_verify") is None:
            raise UserError(
                "mathematical answers are compared by math-verify; install it with: pip install 'tokensieve[rl]'"
            )
        self._seconds, self._lock = seconds, threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._end: Any = None  # ends the process: when it is late, at last with this object

    def equal(self, answer: str, right: str) -> bool:
        """Whether the last expression of a text has the value of `right`. One that takes too long has not."""
        end = final(answer)[-LONGEST:].rstrip(".。")
        if WHOLE.fullmatch(end) and WHOLE.fullmatch(right):  # most answers; no process need look at them
            return int(end) == int(right)
        # A sentence is searched for its last number; mathematics is read as a whole, or 2 sqrt 3 would count as 2.
        marked = boxed(end) if is_expression(end) or BOXED in answer else end
        with self._lock:
            if self._process is None:
                self._process = _start()
                self._end = weakref.finalize(self, _end, self._process)
            process = self._process
            late = threading.Event()

            def stop() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(self._seconds, stop)
            timer.start()
            reply = _ask(process, {"right": boxed(right), "answer": marked})
            timer.cancel()
            timer.join()
            if late.is_set() or not reply:
                self._end()
                self._process = None
            return reply == "true\n"


def is_expression(text: str) -> bool:
    """Whether a text is mathematics alone: a digit or a LaTeX command, and no word."""
    return re.search(r"[\d\\]", text) is not None and is_symbolic(text)


def is_symbolic(text: str) -> bool:
    """Whether a text has a digit, a letter or a LaTeX command, and no word."""
    bare = re.sub(r"\\(text|mbox)\{[^{}]*\}", "", text)
    return re.search(r"[\dA-Za-z\\]", text) is not None and WORD.search(bare) is None


def final(answer: str) -> str:
    r"""What an answer ends in: the content of its last \boxed{}, or its last line."""
    start = answer.rfind(BOXED)
    if start < 0:
        return next((line.strip() for line in reversed(answer.splitlines()) if line.strip()), "")
    depth, content = 1, answer[start + len(BOXED) :]
    for place, character in enumerate(content):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return content[:place]
    return content


def boxed(text: str) -> str:
    """The text in the mark in which mathematics is read whole, unless it has marks of its own."""
    return text if "$" in text else f"{BOXED}{text}}}"


def _start() -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-P", expressions_worker.__file__],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
    )  # fmt: skip
    if process.stdout is None or process.stdout.readline() != expressions_worker.READY:
        _end(process)
        raise UserError("math-verify does not start; see why: python -c 'import math_verify'")
    return process


def _ask(process: "subprocess.Popen[str]", question: dict[str, str]) -> str:
    """The worker's reply; empty if it has died."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return ""
    return process.stdout.readline()


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
