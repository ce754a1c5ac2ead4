"""Codeforces: Div. 1 problems in the format of open-r1/codeforces, solved in Python and judged in the sandbox.

A row has "id", "rating", "contest_name", "description", "input_format", "output_format", "note", "examples" and
"official_tests" ({"input", "output"} each), "official_tests_complete", "generated_checker", "input_mode",
"interaction_format", "time_limit" in seconds, "memory_limit" in MB. The expected outputs never enter the sandbox.
"""

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tokensieve import sandbox
from tokensieve.config import UserError
from tokensieve.evals.endpoint import Endpoint, Late, Refused, Reply
from tokensieve.evals.paper.asking import Asked, kept_json
from tokensieve.evals.paper.benchmarks import Benchmark
from tokensieve.evals.paper.harnesses import Unavailable
from tokensieve.evals.paper.needs import local_data
from tokensieve.evals.paper.scores import Graded
from tokensieve.files import write_text
from tokensieve.paper_config import PaperConfig

SUBSET, SPLIT = "verifiable", "test"
FILE = "answers.jsonl"
TIMES, START = 5.0, 1.0  # a Python program has so many times the limit of a compiled one, and seconds to start
MEBI = 1 << 20
SILENT = 8  # problems without one answer in between, after which no other is asked
FENCE = re.compile(r"```[ \t]*\w*[ \t]*\n(.*?)```", re.DOTALL)

REQUEST = (
    "Write a Python 3 program that solves this problem. It reads standard input and writes standard output. It may "
    "take {seconds:g} seconds and {memory:g} MB for each test. End with the whole program in one fenced block."
)


@dataclass(frozen=True)
class Problem:
    """A problem that can be judged by comparing outputs. seconds, memory: limits, of a compiled program and in MB."""

    id: str
    rating: float
    text: str
    tests: tuple[tuple[str, str], ...]
    seconds: float
    memory: float

    def limits(self, expected: str) -> sandbox.Limits:
        """Those of a test whose output is `expected`."""
        seconds, output = START + TIMES * self.seconds, MEBI + 2 * len(expected.encode())
        memory = int(self.memory * MEBI)
        return sandbox.Limits(2 * seconds, seconds, memory_bytes=memory, output_bytes=output)

    @property
    def message(self) -> str:
        return f"{REQUEST.format(seconds=TIMES * self.seconds, memory=self.memory)}\n\n{self.text}"


def run(benchmark: Benchmark, config: PaperConfig, asked: Asked, folder: Path) -> list[Graded]:
    """The graded answers to a benchmark. What is finished stays in `folder`, and the next call goes on from there.

    A request that is refused or answered too late has no score, and the next call makes it again.

    Raises:
        Unavailable: there are no problems, the endpoint has no chat, or programs cannot be isolated here.
        UserError: the endpoint is down or answers nonsense; or nothing comes in time, be it for `SILENT` problems in a
            row alone. What is finished is kept.
    """
    why = sandbox.why_not()
    if why is not None:
        raise Unavailable(f"no program can be isolated here: {why}")
    problems = [*select(_rows(benchmark, config))]
    if not problems:
        raise Unavailable("no problem of a Div. 1 contest with complete tests and without a checker of its own")
    problems = problems[: config.limit or None]
    file = folder / FILE
    finished = _finished(file)
    todo = [
        (problem, number)
        for problem in problems
        for number in range(asked.repeats)
        if (problem.id, number) not in finished
    ]
    write_text(file, "".join(_row(number, graded) for (_, number), graded in finished.items()))
    endpoint = Endpoint(asked.url, asked.key, config.seconds, config.retries, setting="seconds")
    sampling = {"temperature": config.temperature, "top_p": config.top_p}
    failed: UserError | Refused | None = None
    silent: dict[str, UserError | Refused] = {}  # since the last answer, by problem
    missed: list[Graded] = []
    waiting, running = iter(todo), dict[Future[Reply], tuple[Problem, int]]()
    with file.open("a", encoding="utf-8") as out:

        def ask() -> None:
            for problem, number in islice(waiting, config.at_once - len(running)):
                chat = partial(endpoint.chat, asked.model, problem.message, asked.max_tokens, **sampling)
                running[_begun(chat)] = problem, number

        ask()
        while running:
            ready = [(running.pop(future), future) for future in wait(running, return_when=FIRST_COMPLETED).done]
            if failed is None:
                ask()
            for (problem, number), future in ready:
                try:
                    reply = future.result()
                except (Late, Refused) as error:
                    missed.append(Graded(problem.id, None, level=problem.rating))
                    silent.setdefault(problem.id, error)
                    failed = failed or (error if len(silent) == SILENT else None)
                    continue
                except UserError as error:
                    failed = failed or error  # answers that are being made are still kept
                    continue
                silent.clear()
                graded = Graded(problem.id, grade(problem, reply.content), reply.output_tokens, problem.rating)
                finished[problem.id, number] = graded
                out.write(_row(number, graded))
                out.flush()
    endpoint.close()
    if silent and not finished:
        failed = failed or next(iter(silent.values()))
    if isinstance(failed, Refused):
        raise Unavailable(str(failed)) from failed
    if failed is not None:
        raise failed
    wanted = {(problem.id, number) for problem in problems for number in range(asked.repeats)}
    return [graded for place, graded in finished.items() if place in wanted] + missed


def select(rows: Sequence[Mapping[str, Any]]) -> Iterator[Problem]:
    """The problems of Div. 1 contests that can be judged by comparing outputs.

    Left out are interactive ones, those that read files, those with a checker of their own, and those whose tests are
    not complete. Unavailable for rows of another format.
    """
    for number, row in enumerate(rows):
        try:
            if "Div. 1" not in str(row["contest_name"]) or row["rating"] is None:
                continue
            if row["input_mode"] != "stdio" or row.get("interaction_format") or row.get("generated_checker"):
                continue
            if not row["official_tests_complete"] or not row["official_tests"]:
                continue
            yield Problem(
                str(row["id"]),
                float(row["rating"]),
                _text(row),
                tuple((str(test["input"]), str(test["output"])) for test in row["official_tests"]),
                float(row["time_limit"]),
                float(row["memory_limit"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Unavailable(f"row {number} is not one of open-r1/codeforces: {error!r}") from error


def grade(problem: Problem, answer: str) -> float:
    """1 if the program in the answer's last fenced block prints what is expected for every test, else 0.

    Outputs are compared word by word, as Codeforces does without a checker.
    """
    programs = FENCE.findall(answer)
    if not programs:
        return 0.0
    for given, expected in problem.tests:
        result = sandbox.python(programs[-1], stdin=given.encode(), limits=problem.limits(expected))
        if not result.succeeded or result.out.split() != expected.encode().split():
            return 0.0
    return 1.0


def _begun(chat: Callable[[], Reply]) -> Future[Reply]:
    """An answer that is made in a thread of its own, for which a program that is interrupted does not wait."""
    future = Future[Reply]()

    def make() -> None:
        try:
            future.set_result(chat())
        except (UserError, Refused) as error:
            future.set_exception(error)
        finally:
            if not future.done():  # an error of ours
                future.set_exception(sys.exc_info()[1])

    threading.Thread(target=make, daemon=True).start()
    return future


def _text(row: Mapping[str, Any]) -> str:
    parts = [("", row["description"]), ("Input", row["input_format"]), ("Output", row["output_format"])]
    for number, example in enumerate(row.get("examples") or (), 1):
        parts += [(f"Input of example {number}", example["input"]), (f"Its output, {number}", example["output"])]
    parts.append(("Note", row.get("note")))
    sections = [f"{title}:\n{text}" if title else str(text) for title, text in parts if text]
    return "\n\n".join([str(row["title"]), *sections])


def _rows(benchmark: Benchmark, config: PaperConfig) -> list[Mapping[str, Any]]:
    """The rows of local .jsonl or .parquet files, or of the hub."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("Codeforces needs the datasets package; pip install 'tokensieve[eval]'") from error
    folder = local_data(benchmark, config)
    try:
        if folder is None:
            return [*datasets.load_dataset(benchmark.task, SUBSET, split=SPLIT)]
        lines = [row for path in sorted(folder.glob("*.jsonl")) for row in _lines(path)]
        tables = [str(path) for path in sorted(folder.glob("*.parquet"))]
        return lines + ([*datasets.Dataset.from_parquet(tables)] if tables else [])
    except (OSError, ValueError) as error:
        raise Unavailable(f"its data cannot be read: {' '.join(str(error).split())[:200]}") from error


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _row(number: int, graded: Graded) -> str:
    return json.dumps({"number": number, **graded.to_dict()}) + "\n"


def _finished(file: Path) -> dict[tuple[str, int], Graded]:
    """The answers of an earlier run, by problem and number. A last line that a kill has cut is left out."""
    rows = [kept_json(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    found = {}
    for row in rows:
        if isinstance(row, dict):
            number = row.pop("number")
            found[row["problem"], number] = Graded(**row)
    return found
