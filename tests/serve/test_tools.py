"""Tool calls through OpenAI's own client. Required calls are made even by a model with random weights."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

import tokensieve
from tests.support import servers
from tokensieve.engine import EngineConfig
from tokensieve.serve.markers import CALL_BEGIN, CALL_END, CALL_SEPARATOR, CALLS_BEGIN, CALLS_END

# A minimal template that writes tools and calls as that of DeepSeek-V3.1 does.
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{{ '<｜User｜>' if m.role == 'user' else '<｜Assistant｜>' }}{{ m.content }}"
    "{% if m.tool_calls %}{{ BEGIN }}{% for c in m.tool_calls %}"
    "{{ CALL + c.function.name + SEPARATOR + c.function.arguments + CALL_END }}{% endfor %}{{ END }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
# As those of DeepSeek-V3-0324 and R1 do.
V3 = TEMPLATE.replace(
    "c.function.name + SEPARATOR + c.function.arguments",
    "c.type + SEPARATOR + c.function.name + '\\n```json\\n' + c.function.arguments + '\\n```'",
).replace("{% endfor %}{{ END", "{{ '\\n' if not loop.last }}{% endfor %}{{ END")
MARKERS = {
    "BEGIN": CALLS_BEGIN,
    "CALL": CALL_BEGIN,
    "SEPARATOR": CALL_SEPARATOR,
    "CALL_END": CALL_END,
    "END": CALLS_END,
}
CITY = {"city": {"enum": ["Rome", "Kyōto"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": CITY,
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"properties": {}, "additionalProperties": False}},
}
ASKED: dict[str, Any] = {
    "model": "sparse",
    "messages": [{"role": "user", "content": "Rome?"}],
    "tools": [WEATHER, CLOCK],
    "max_tokens": 200,
}


def tokenizer(template: str, markers: str = "text") -> Any:
    """The bundled tokenizer with this template.

    markers: `text`, or added tokens that are `plain` or `special`, as checkpoints have them.
    """
    made = AutoTokenizer.from_pretrained(tokensieve.load_tokenizer("sparse").name_or_path)
    made.chat_template = "".join(f"{{% set {name} = {text!r} %}}" for name, text in MARKERS.items()) + template
    if markers != "text":
        made.add_tokens([AddedToken(text, special=markers == "special") for text in MARKERS.values()])
    return made


KINDS = [pytest.param(("text", TEMPLATE), marks=pytest.mark.slow), ("plain", V3), ("special", TEMPLATE)]


@pytest.fixture(scope="module", params=KINDS, ids=["text", "V3", "V3.1"])
def client(request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    markers, template = request.param
    loaded = servers.tiny(tokenizer(template, markers))
    with servers.running(loaded, EngineConfig(pages=64, running=16), max_body=2**20) as (at, _):
        yield openai.OpenAI(base_url=at + "/v1", api_key="none", max_retries=0)


def calls_of(choice: Any) -> list[tuple[str, Any]]:
    assert choice.finish_reason == "tool_calls" and choice.message.content is None, choice
    return [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]


def is_right(name: str, arguments: Any) -> bool:
    if name == "clock":
        return arguments == {}
    return name == "weather" and set(arguments) == {"city", "days"} and arguments["city"] in CITY["city"]["enum"]


def test_a_call_that_is_required(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ASKED, tool_choice="required", parallel_tool_calls=False, n=8, seed=1)
    calls = [calls_of(choice) for choice in answer.choices]
    assert all(len(its) == 1 and is_right(*its[0]) for its in calls)
    assert {its[0][0] for its in calls} == {"weather", "clock"}


def test_the_function_that_is_named(client: openai.OpenAI) -> None:
    for named in ("weather", "clock"):
        choice = {"type": "function", "function": {"name": named}}
        answer = client.chat.completions.create(**ASKED, tool_choice=choice, n=2, seed=2)
        for one in answer.choices:
            ((name, arguments),) = calls_of(one)
            assert name == named and is_right(name, arguments)


def test_a_function_without_parameters_takes_none(client: openai.OpenAI) -> None:
    bare = {"type": "function", "function": {"name": "now", "parameters": None}}
    answer = client.chat.completions.create(**ASKED | {"tools": [bare]}, tool_choice="required", n=2, seed=4)
    assert all(
        call == ("now", {})
        for choice in answer.choices
        if choice.finish_reason != "length"
        for call in calls_of(choice)
    )


def test_parallel_calls_as_a_stream(client: openai.OpenAI) -> None:
    """As many calls as the model makes. If the tokens run out first, the finish reason of the cut answer says so."""
    found: dict[int, list[Any]] = {}
    asked = ASKED | {"tool_choice": "required", "n": 8, "seed": 3, "stream": True}
    for chunk in client.chat.completions.create(**asked):
        for choice in chunk.choices:
            found.setdefault(choice.index, []).append(choice)
    counts = []
    for choices in found.values():
        calls = [call for c in choices for call in c.delta.tool_calls or ()]
        assert [call.index for call in calls] == list(range(len(calls)))
        whole = calls[:-1] if choices[-1].finish_reason == "length" else calls  # the last may be cut off
        assert all(is_right(call.function.name, json.loads(call.function.arguments)) for call in whole)
        assert not any("tool" in (c.delta.content or "") for c in choices), "a marker"
        assert choices[-1].finish_reason in ("tool_calls", "length")
        counts.append(len(calls))
    ids = [call.id for choices in found.values() for c in choices for call in c.delta.tool_calls or ()]
    assert len(set(ids)) == len(ids)
    assert len(counts) == 8 and max(counts) > 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tool_choice": "required", "tools": []}, "not among tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "gone"}}}, "not among tools"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        (
            {
                "tool_choice": "required",
                "tools": [CLOCK | {"function": {"name": "f", "parameters": {"properties": {"a": {"type": "cow"}}}}}],
            },
            'cannot be followed: Invalid type: cow, in function_0: "f"',
        ),
    ],
)
def test_refusals(client: openai.OpenAI, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(**ASKED | changes)


def test_what_is_too_large_to_compile_is_refused_once(client: openai.OpenAI) -> None:
    """Before the engine would refuse it for each of 128 answers."""
    large = {"enum": ["x" * 999] * 17 * 2}
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": large}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": large}}}}
    for changes in ({"response_format": shape, "tools": []}, {"tools": [tool], "tool_choice": "required"}):
        with pytest.raises(openai.BadRequestError, match="characters"):
            client.chat.completions.create(**ASKED | changes, n=16)


def test_a_template_with_another_notation() -> None:
    """Calls would arrive as text, so tools are refused."""
    other = tokenizer(TEMPLATE.replace("CALL + c", "CALL + c.type + c"))
    with servers.running(servers.tiny(other), EngineConfig(pages=64)) as (at, _):
        client = openai.OpenAI(base_url=at + "/v1", api_key="none", max_retries=0)
        assert client.chat.completions.create(**ASKED | {"max_tokens": 2}, tool_choice="none").choices
        with pytest.raises(openai.BadRequestError, match="no known notation"):
            client.chat.completions.create(**ASKED)
