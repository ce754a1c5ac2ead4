"""Agentic coding: a small project with a fault, tools to read and change it, and tests that run in the sandbox.

The tests are cases of input and output that are no files of the project, and the verdict is computed outside of the
sandbox, from what the program printed. So there is no test to edit, and no verdict to print.
"""

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from tokensieve import sandbox
from tokensieve.tasks.documents import Split
from tokensieve.tasks.problems.problem import Item
from tokensieve.tasks.problems.programming import ENDS, LIMITS, STEPS, outcome
from tokensieve.tasks.problems.programming import Step as Transform
from tokensieve.tasks.problems.tools import Call, CallFault, Step, Tool

SEEN, HIDDEN = 2, 4  # cases that `run_tests` runs, and those that the grade is by
TRIES = 100  # draws of cases until the fault shows in both kinds
MOST_PRINTED = 100  # characters of a program's output in a result
CHANGED, PASSED = "The file is changed.", "{} of {} tests pass."
MODULES: dict[Split, tuple[str, ...]] = {
    "train": ("one.py", "two.py", "three.py", "four.py", "five.py"),
    "test": ("first.py", "second.py", "third.py", "fourth.py", "fifth.py"),
}
# By split, and no phrasing in both: the question, what is thought of a module, and the answer.
PHRASES: dict[str, dict[Split, tuple[str, str, str, str]]] = {
    "en": {
        "train": (
            "The project has the files {files}. For the input {given} it prints {wrong} instead of {right}, since one "
            "of its functions does not do what its docstring says. Correct it.",
            "{file} is as it should be.",
            "{file} is wrong.",
            "{file} is corrected.",
        ),
        "test": (
            "There is a bug in a module of this project ({files}): code and docstring differ. Fed with {given}, it "
            "outputs {wrong}, where {right} would be correct. Repair the code.",
            "Nothing is amiss in {file}.",
            "The bug is in {file}.",
            "The bug in {file} is gone.",
        ),
    },
    "zh": {
        "train": (
            "项目有这些文件：{files}。输入{given}时输出{wrong}，而不是{right}，因为其中一个函数与它的说明不符。请改正。",
            "{file}没有问题。",
            "{file}有错。",
            "{file}已改正。",
        ),
        "test": (
            "这个项目（{files}）的某个模块里有缺陷：代码和文档不一致。给它{given}会打印{wrong}，正确的是{right}。请修复代码。",
            "{file}正常。",
            "缺陷在{file}里。",
            "{file}中的缺陷已修复。",
        ),
    },
}
TOOLS = (
    Tool("read_file", ("file",), {"en": "the text of a file", "zh": "文件的内容"}),
    Tool("write_file", ("file", "text"), {"en": "gives a file a new text", "zh": "改写整个文件"}),
    Tool(
        "replace",
        ("file", "old", "new"),
        {"en": "replaces the one place that reads old", "zh": "替换文件中唯一的一处 old"},
    ),
    Tool("run_tests", (), {"en": "runs the tests", "zh": "运行测试"}),
)


Stage = tuple[Transform, int]  # a step and its number


class Case(NamedTuple):
    """A line of input, and what the program has to print."""

    given: str
    expected: str


@dataclass(frozen=True)
class Coding:
    """A program in modules, one of which is wrong. Difficulty: modules beside the main file, from 1 to 5.

    The grade is 1 if the project, after all calls, prints what is expected for each of the hidden inputs, else 0; what
    the answer says counts for nothing, but it may not be empty. UserError on a machine without isolation.
    """

    name: str = "coding"
    languages: tuple[str, ...] = ("en", "zh")
    difficulty: tuple[int, int, int] = (1, 1, 5)
    tools: tuple[Tool, ...] = TOOLS
    most_calls: int = 12

    def draw(self, rng: random.Random, difficulty: int, language: str, split: Split) -> Item:
        cases: list[Case] = []
        while not cases:
            end, place = rng.choice([*ENDS]), rng.randrange(difficulty)
            right = [(step, rng.randint(2, 9)) for step in rng.choices(STEPS, k=difficulty)]
            step, n = right[place]
            fault = (step, n + rng.choice([-1, 1])) if rng.random() < 0.5 else (rng.choice(STEPS), n)
            wrong = [*right[:place], fault, *right[place + 1 :]]
            cases = _cases(rng, right, wrong, end)
        names = MODULES[split][:difficulty]
        files = {"main.py": _main(names, end)}
        for name, (step, n), stage in zip(names, right, wrong, strict=True):
            files[name] = f'def run(x):\n    """{step.text[language][split].format(n=n)}"""\n    {_line(stage)}\n'
        question, fine, found, done = PHRASES[language][split]
        file, given = names[place], cases[0].given
        thoughts = ["", *(fine.format(file=name) for name in names[:place])]
        steps = [
            Step(thought, Call("read_file", {"file": name}), files[name])
            for thought, name in zip(thoughts, names[: place + 1], strict=True)
        ]
        change = Call("replace", {"file": file, "old": _line(fault), "new": _line(right[place])})
        steps.append(Step(found.format(file=file), change, CHANGED))
        steps.append(Step("", Call("run_tests", {}), PASSED.format(SEEN, SEEN)))
        printed = outcome(wrong, end, [*map(int, given.split())])
        asked = question.format(files=", ".join(files), given=given, wrong=printed, right=cases[0].expected)
        key = " ".join([*(f"{STEPS.index(step)}:{n}" for step, n in right), end, str(place)])
        data = tuple(text for pair in (*files.items(), *cases) for text in pair)
        answer = done.format(file=file)
        return Item(key, asked, answer, answer, data, steps=tuple(steps))

    def respond(self, item: Item, calls: Sequence[Call]) -> str:
        files, cases = _project(item, calls[:-1])
        call = calls[-1]
        if call.name == "run_tests":
            return _report(cases[:SEEN], _run(files, cases[:SEEN]))
        if call.name == "read_file":
            return _text(files, call)
        _change(files, call)
        return CHANGED

    def grade(self, item: Item, answer: str, calls: Sequence[Call] = ()) -> float:
        files, cases = _project(item, calls)
        # One after the other, so that a program that never ends takes its time once.
        return float(bool(answer.strip()) and all(_passes(case, *_run(files, [case])) for case in cases[SEEN:]))


def _line(stage: Stage) -> str:
    """The line of a module that does a step."""
    step, n = stage
    return f"return {step.line.format(n=n).removeprefix('x = ')}"


def _main(names: Sequence[str], end: str) -> str:
    """The main file, which sends the numbers through the modules of these names."""
    modules = [name.removesuffix(".py") for name in names]
    lines = [f"import {', '.join(modules)}", "x = list(map(int, input().split()))"]
    return "\n".join([*lines, *(f"x = {module}.run(x)" for module in modules), ENDS[end][1], ""])


def _cases(rng: random.Random, right: Sequence[Stage], wrong: Sequence[Stage], end: str) -> list[Case]:
    """Different cases, of which the first shows the fault, and a hidden one too. None if the draws have no such."""
    for _ in range(TRIES):
        inputs = [[rng.randint(-20, 20) for _ in range(rng.randint(1, 9))] for _ in range(SEEN + HIDDEN)]
        expected = [outcome(right, end, numbers) for numbers in inputs]
        shows = [outcome(wrong, end, numbers) != y for numbers, y in zip(inputs, expected, strict=True)]
        differ = len({*map(tuple, inputs)}) == len(inputs) and len({*expected[SEEN:]}) > HIDDEN // 2
        if shows[0] and any(shows[SEEN:]) and differ:
            return [Case(" ".join(map(str, x)), str(y)) for x, y in zip(inputs, expected, strict=True)]
    return []


def _project(item: Item, calls: Sequence[Call]) -> tuple[dict[str, str], list[Case]]:
    """The files of a project after some calls, of which those that cannot be done do nothing; and its cases."""
    pairs = [*zip(item.data[::2], item.data[1::2], strict=True)]
    files, cases = dict(pairs[: -SEEN - HIDDEN]), [Case(*pair) for pair in pairs[-SEEN - HIDDEN :]]
    for call in calls:
        if call.name in ("write_file", "replace"):
            with suppress(CallFault):
                _change(files, call)
    return files, cases


def _text(files: Mapping[str, str], call: Call) -> str:
    file = call.arguments["file"]
    if file not in files:
        raise CallFault(f"error: there is no such file; the files are {', '.join(files)}")
    return files[file]


def _change(files: dict[str, str], call: Call) -> None:
    text = _text(files, call)
    if call.name == "write_file":
        text = call.arguments["text"]
    else:
        old = call.arguments["old"]
        count = text.count(old) if old else 0
        if count != 1:
            raise CallFault(f"error: old stands {count} times in the file; it must stand there once")
        text = text.replace(old, call.arguments["new"])
    files[call.arguments["file"]] = text


def _run(files: Mapping[str, str], cases: Sequence[Case]) -> list[sandbox.Result]:
    """What the project prints for each input. Only the input enters the sandbox."""
    command = [sandbox.interpreter(), "-E", "-s", "-S", "-B", "main.py"]  # not -I, which hides the other modules
    programs = [sandbox.Program(command, files, f"{case.given}\n".encode(), LIMITS) for case in cases]
    return sandbox.run_many(programs, workers=1)  # answers are graded side by side, and a full machine would cut them


def _passes(case: Case, result: sandbox.Result) -> bool:
    return result.succeeded and result.out.split() == [case.expected.encode()]


def _report(cases: Sequence[Case], results: Sequence[sandbox.Result]) -> str:
    passed = [_passes(case, result) for case, result in zip(cases, results, strict=True)]
    lines = [PASSED.format(sum(passed), len(cases))]
    for case, result in [pair for pair, good in zip(zip(cases, results), passed, strict=True) if not good]:
        printed = result.out if result.succeeded else result.err.strip().rpartition(b"\n")[2] or result.ended.encode()
        told = printed.decode(errors="replace").strip()[:MOST_PRINTED]
        lines.append(f"Input {case.given}: expected {case.expected}, got {told!r}.")
    return "\n".join(lines)
