"""Agents: their tools do what the worked examples show, state is of the calls alone, and nothing escapes."""

import random
import re
from dataclasses import replace
from typing import Any

import pytest

import tokensieve
from tokensieve.tasks import Answer, encoder
from tokensieve.tasks.problems import DOMAINS, MODES, Agent, Call, CallFault, Item, Problem, Problems, coding
from tokensieve.tasks.turns import END_THINK, THINK

AGENTS = [name for name, domain in DOMAINS.items() if isinstance(domain, Agent)]
CODING, SEARCH = DOMAINS["coding"], DOMAINS["search"]


@pytest.fixture(scope="module")
def encode():
    return encoder(tokensieve.load_tokenizer("base"))


def drawn(name: str, difficulty: int = 2, language: str = "en") -> Item:
    return DOMAINS[name].draw(random.Random(5), difficulty, language, "train")


def change(file: str, text: str) -> Call:
    return Call("write_file", {"file": file, "text": text})


def test_who_has_tools() -> None:
    assert AGENTS == ["coding", "search"]


@pytest.mark.parametrize(("name", "language"), [(name, lang) for name in AGENTS for lang in ("en", "zh")])
def test_the_results_of_worked_examples_are_those_of_the_tools(name: str, language: str, encode) -> None:
    task = Problems(DOMAINS[name], encode, "think", language)
    for difficulty in DOMAINS[name].difficulty[::2]:
        for example in task.examples("test", 2, difficulty):
            turns: list[str] = []
            for turn, result in example.steps:
                turns.append(turn)
                assert task.respond(example, turns) == result
            assert task.respond(example, [*turns, example.demonstration]) is None  # the answer calls nothing
            assert len(turns) <= DOMAINS[name].most_calls


def turn(mode: str, call: Any) -> str:
    return f"{THINK}so{END_THINK}{call}" if mode == "think" else str(call)


@pytest.mark.parametrize("mode", MODES)
def test_an_episode_has_so_many_calls_and_faulty_ones_count(mode: str, encode) -> None:
    task = Problems(SEARCH, encode, mode)
    (example,) = task.examples("train", 1)
    faulty = turn(mode, "<tool_call>{</tool_call>")
    calls = [faulty] * SEARCH.most_calls
    assert "error: a call is JSON" in (task.respond(example, calls) or "")
    assert task.respond(example, [*calls, faulty]) is None
    right = Answer(example.demonstration, earlier=tuple(calls))
    assert task.score(example, right).value == 1  # what could not be run did nothing
    assert task.score(example, Answer(faulty, earlier=tuple(calls))).value == 0
    other = turn("direct" if mode == "think" else "think", example.item.steps[0].call)
    assert task.score(example, Answer(example.demonstration, earlier=(other,))).parts["format"] == 0
    if mode == "think":  # a call in thoughts is none
        assert task.respond(example, [f"{THINK}{example.item.steps[0].call}"]) is None


def test_a_search_finds_what_it_names_first_and_takes_any_text() -> None:
    for language in ("en", "zh"):
        item = drawn("search", 3, language)
        for title in [document.partition("\n")[0] for document in item.data[2:]]:
            assert SEARCH.respond(item, [Call("search", {"query": title})]).startswith(f"{title}\n")
    hostile = ['" OR title:*', "NEAR(", "'; DROP TABLE documents; --", "-", "\0", "a " * 100_000, "甲" * 10_000, ""]
    for text in hostile:
        assert SEARCH.respond(item, [Call("search", {"query": text})]) == "nothing found"
    result = SEARCH.respond(item, [Call("search", {"query": " ".join(item.data[2:])})])
    assert len(result.split("\n\n")) == 3  # never the whole corpus


def test_a_chain_has_one_end_and_the_tools_lead_to_it() -> None:
    """The facts of the documents, followed from the name in the question, end at the answer."""
    for difficulty in (2, 5):
        item = drawn("search", difficulty)
        assert len(item.steps) == difficulty and item.answer not in item.question
        assert item.data[1] in item.question and item.steps[0].call.arguments["query"] == item.data[1]
        for step, following in zip(item.steps, item.steps[1:]):
            assert following.call.arguments["query"] in step.result
        assert item.answer in item.steps[-1].result


def test_a_session_of_files_and_tests() -> None:
    item = drawn("coding")
    respond = CODING.respond
    module, text = item.data[2], item.data[3]
    broken = change(module, "def run(x):\n    return y\n")
    assert respond(item, [Call("read_file", {"file": module})]) == text
    report = respond(item, [broken, Call("run_tests", {})])
    assert report.startswith("0 of 2 tests pass.\n") and "NameError" in report
    assert respond(item, [broken, Call("read_file", {"file": module})]) == broken.arguments["text"]
    assert respond(item, [broken, change(module, text), Call("read_file", {"file": module})]) == text
    for calls, message in (
        ([Call("replace", {"file": module, "old": "nowhere", "new": ""})], "old stands 0 times"),
        ([Call("replace", {"file": module, "old": "", "new": "x"})], "old stands 0 times"),
        ([Call("replace", {"file": module, "old": "\n", "new": "x"})], "old stands 3 times"),
        ([Call("read_file", {"file": "/etc/passwd"})], "there is no such file; the files are main.py"),
        ([change("../../escape.py", "x")], "there is no such file"),
    ):
        with pytest.raises(CallFault, match=message):
            respond(item, calls)
        assert respond(item, [*calls, Call("read_file", {"file": module})]) == text  # and nothing has changed
    assert CODING.grade(item, "Done.", [step.call for step in item.steps]) == 1


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("while True: pass", "time"),
        ("print('x' * 10**6)", "output"),
        ("import os; os.kill(os.getpid(), 9)", "signal"),
        ("open('/etc/passwd').read()", "Error"),
        ("import socket; socket.create_connection(('127.0.0.1', 80))", "Error"),
    ],
)
def test_a_hostile_project_is_reported_and_earns_nothing(program: str, told: str, monkeypatch) -> None:
    monkeypatch.setattr(coding, "LIMITS", replace(coding.LIMITS, cpu_seconds=0.3))
    item = drawn("coding", 1)
    calls = [change("main.py", program), Call("run_tests", {})]
    report = CODING.respond(item, calls)
    assert report.startswith("0 of 2 tests pass.\n") and re.search(told, report) and len(report) < 1000
    assert CODING.grade(item, "Done.", calls) == 0


def test_a_tool_that_returns_a_megabyte_is_cut(encode) -> None:
    task = Problems(CODING, encode, "direct")
    (example,) = task.examples("train", 1)
    turns = [str(change("main.py", "#" * 2**20)), str(Call("read_file", {"file": "main.py"}))]
    result = task.respond(example, turns) or ""
    assert len(result) < 2200 and f"of {2**20} characters are shown" in result


def test_prompts_hold_whole_episodes(encode) -> None:
    for name in AGENTS:
        task = Problems(DOMAINS[name], encode, "direct", tokens=1500)
        example: Problem = task.examples("train", 1)[0]
        text = "\n".join(message["content"] for message in example.prompt)
        assert text.count("<tool_response>") == text.count("</tool_response>") >= 2 * len(example.steps)
        assert all(f"{tool.name}(" in text for tool in DOMAINS[name].tools)
        assert all(message["role"] == "user" for message in example.prompt if "<tool_response>" in message["content"])
