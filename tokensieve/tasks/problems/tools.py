"""Tools of agents: how a call stands in a model's answer, and how its result comes back.

A call is text, in the notation of Hermes, which Qwen's models and many others learnt too. So every chat format can
carry it: the model ends its turn with `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, and the next user's
turn holds `<tool_response>...</tool_response>`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokensieve.tasks.turns import CALL, END_CALL

MOST_CHARS = 2000  # of a result; the rest is cut
RESPONSE, END_RESPONSE = "<tool_response>", "</tool_response>"

LISTING = {
    "en": (
        f'Tools, one call at the end of a turn as {CALL}{{"name": NAME, "arguments": {{...}}}}{END_CALL}, '
        "at most {most} calls:",
        "{name}({parameters}): {text}",
    ),
    "zh": (
        f'工具：每轮末尾调用一次，写作 {CALL}{{"name": 名称, "arguments": {{...}}}}{END_CALL}，最多调用{{most}}次：',
        "{name}({parameters})：{text}",
    ),
}


@dataclass(frozen=True)
class Tool:
    """A function that a model may call. Its parameters are texts, and none is optional.

    text: what it does, by language.
    """

    name: str
    parameters: tuple[str, ...]
    text: Mapping[str, str]


@dataclass(frozen=True)
class Call:
    """arguments: by the tool's parameters, in any order."""

    name: str
    arguments: Mapping[str, str]

    def __str__(self) -> str:
        body = json.dumps({"name": self.name, "arguments": dict(self.arguments)}, ensure_ascii=False)
        return f"{CALL}{body}{END_CALL}"


@dataclass(frozen=True)
class Step:
    """One turn of a demonstration: thoughts, a call, and its result."""

    thoughts: str
    call: Call
    result: str


class CallFault(Exception):
    """A call that cannot be run. Its text is the result that the model reads."""


def call_in(text: str, tools: Sequence[Tool]) -> Call | None:
    """The call that a turn without its thoughts ends with; None if it has none. CallFault if it has one of no use."""
    _, begin, rest = text.partition(CALL)
    if not begin:
        return None
    body, end, after = rest.partition(END_CALL)
    if not end or after.strip():
        raise CallFault(f"error: a turn ends with one call, and a call with {END_CALL}")
    try:
        call = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise CallFault('error: a call is JSON, {"name": NAME, "arguments": {...}}') from error
    if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
        raise CallFault('error: a call has "name" and "arguments", and nothing else')
    tool = next((tool for tool in tools if tool.name == call["name"]), None)
    if tool is None:
        raise CallFault(f"error: there is no such tool; the tools are {', '.join(tool.name for tool in tools)}")
    arguments = call["arguments"]
    if not isinstance(arguments, dict) or arguments.keys() != {*tool.parameters}:
        raise CallFault(f"error: the arguments of {tool.name} are: {', '.join(tool.parameters) or 'none'}")
    if not all(isinstance(value, str) and is_text(value) for value in arguments.values()):
        raise CallFault(f"error: every argument of {tool.name} is a text")
    return Call(tool.name, arguments)


def is_text(value: str) -> bool:
    """Whether it can be written in UTF-8: JSON can spell half of a surrogate pair."""
    return not any("\ud800" <= char <= "\udfff" for char in value)


def response(result: str) -> str:
    """A result as the model reads it; one that is too long is cut, and says so."""
    if len(result) > MOST_CHARS:
        result = f"{result[:MOST_CHARS]}\n[cut: {MOST_CHARS} of {len(result)} characters are shown]"
    return f"{RESPONSE}{result}{END_RESPONSE}"


def listing(tools: Sequence[Tool], most: int, language: str) -> str:
    """The tools, and how they are called, for a prompt. most: calls in an episode."""
    head, line = LISTING[language]
    lines = [
        line.format(name=tool.name, parameters=", ".join(tool.parameters), text=tool.text[language]) for tool in tools
    ]
    return "\n".join([head.replace("{most}", str(most)), *lines])
