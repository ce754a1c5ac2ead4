"""Calls in a model's answers, and results: what is no call is answered with what is wrong about it, and long is cut."""

import json

import pytest

from tokensieve.tasks.problems import DOMAINS, Call, CallFault
from tokensieve.tasks.problems.tools import MOST_CHARS, call_in, listing, response
from tokensieve.tasks.turns import CALL, END_CALL

TOOLS = DOMAINS["coding"].tools


def test_a_call_is_read_as_it_is_written() -> None:
    call = Call("replace", {"file": "a.py", "old": 'x = "\\n"', "new": "甲\n"})
    assert call_in(f"Now then. {call}", TOOLS) == call_in(f"{call}\n", TOOLS) == call
    assert call_in("no call", TOOLS) is None and call_in("", TOOLS) is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"name": "run_tests", "arguments": {}}', None),
        ('{"name": "run_tests", "arguments": {}', "a call is JSON"),
        ("", "a call is JSON"),
        ("[" * 100_000, "a call is JSON"),
        ('["run_tests"]', 'has "name" and "arguments"'),
        ('{"name": "run_tests"}', 'has "name" and "arguments"'),
        ('{"name": "run_tests", "arguments": {}, "id": 1}', 'has "name" and "arguments"'),
        ('{"name": ["run_tests"], "arguments": {}}', "the tools are read_file, write_file, replace, run_tests"),
        ('{"name": "__class__", "arguments": {}}', "there is no such tool"),
        ('{"name": "run_tests", "arguments": {"x": "1"}}', "the arguments of run_tests are: none"),
        ('{"name": "read_file", "arguments": []}', "the arguments of read_file are: file"),
        ('{"name": "read_file", "arguments": {}}', "the arguments of read_file are: file"),
        ('{"name": "read_file", "arguments": {"file": 1}}', "every argument of read_file is a text"),
        ('{"name": "read_file", "arguments": {"file": "\\ud800"}}', "every argument of read_file is a text"),
    ],
)
def test_a_faulty_call_says_what_is_wrong(body: str, message: str | None) -> None:
    text = f"{CALL}{body}{END_CALL}"
    if message is None:
        assert call_in(text, TOOLS) == Call("run_tests", {})
        text, message = text + text, "a turn ends with one call"
    with pytest.raises(CallFault, match=message):
        call_in(text, TOOLS)
    with pytest.raises(CallFault, match="a turn ends with one call"):
        call_in(text.removesuffix(END_CALL), TOOLS)


def test_a_long_result_is_cut_and_says_so() -> None:
    long = response("x" * 2**20)
    assert len(long) < MOST_CHARS + 200 and f"[cut: {MOST_CHARS} of {2**20} characters are shown]" in long
    assert response("y" * MOST_CHARS).count("y") == MOST_CHARS and "cut" not in response("y" * MOST_CHARS)


def test_the_tools_are_listed_with_a_call_that_is_one() -> None:
    for language in ("en", "zh"):
        text = listing(TOOLS, 12, language)
        assert "12" in text and all(f"{tool.name}({', '.join(tool.parameters)})" in text for tool in TOOLS)
        body = text.partition(CALL)[2].partition(END_CALL)[0]
        name = "NAME" if language == "en" else "名称"
        assert json.loads(body.replace(name, '"run_tests"').replace("{...}", "{}"))["arguments"] == {}
