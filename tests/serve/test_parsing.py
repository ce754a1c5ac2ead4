"""Answers parsed as they come, into thinking, content and tool calls, however the text is cut."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import tokensieve
from tokensieve.serve.chat_template import ChatTemplate
from tokensieve.serve.errors import ApiError
from tokensieve.serve.parsing import OutputParser, Piece
from tokensieve.serve.playground.mirror import difference
from tokensieve.serve.schema import ChatRequest

CALL = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
V31 = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
DSML = (
    "<｜DSML｜function_calls>\n"
    '<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Kyōto <3</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">[1, 2]</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n'
    "</｜DSML｜function_calls>"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
# A minimal template that knows tools.
TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}A:{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' + c.function.arguments }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% elif m.role == 'tool' %}T:{{ m.content }}{% else %}{{ m.role + ':' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% if thinking %}<think>{% endif %}{% endif %}"
)


def read(parts: list[str], thinking: bool | None = False, tools: bool = True) -> list[tuple[str, str, str]]:
    """The pieces; neighbours of one kind are joined."""
    answer, joined = OutputParser(thinking, tools), []
    for piece in [*(p for part in parts for p in answer.push(part)), *answer.finish()]:
        if piece.kind != "call" and joined and joined[-1][0] == piece.kind:
            joined[-1] = (piece.kind, joined[-1][1] + piece.text, "")
        else:
            joined.append((piece.kind, piece.text, piece.name))
    return joined


CASES = [
    ("", False, []),
    ("plain < text <｜tool", False, [("content", "plain < text <｜tool", "")]),
    ("hm, </thin", True, [("reasoning", "hm, </thin", "")]),
    ("hm</think>yes</think>", True, [("reasoning", "hm", ""), ("content", "yes</think>", "")]),
    ("</think>yes", True, [("content", "yes", "")]),
    (
        "so:" + V31.format(CALL.format("f", '{"a": 1}') + CALL.format("g", "{}")),
        False,
        [("content", "so:", ""), ("call", '{"a": 1}', "f"), ("call", "{}", "g")],
    ),
    # V3, V3-0324 and R1 name the kind, and write the arguments as a block of Markdown
    (
        "so:" + V31.format(V3.format("f", '{"a": "```"}') + "\n" + V3.format("g", "{}")),
        False,
        [("content", "so:", ""), ("call", '{"a": "```"}', "f"), ("call", "{}", "g")],
    ),
    (V31.format(CALL.format("function", "f\n{}")), False, [("call", "{}", "f")]),
    (V31.format(CALL.format("function", '{"a": 1}')), False, [("call", '{"a": 1}', "function")]),
    (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a"',
        False,
        [("call", '{"a"', "f")],
    ),
    ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f", False, []),
    # a model that may begin a thought itself
    ("\n<think>hm</think>yes", None, [("reasoning", "hm", ""), ("content", "yes", "")]),
    (" <thin", None, [("content", " <thin", "")]),
    ("a <think>b", None, [("content", "a <think>b", "")]),
    (
        "hm</think>" + V31.format(CALL.format("f", "{}")) + " done",
        True,
        [("reasoning", "hm", ""), ("call", "{}", "f"), ("content", " done", "")],
    ),
    # a call that is cut off has as much of its arguments as arrived; a block without any call is text
    ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f", False, []),
    ('<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1<｜tool', False, [("call", '{"a": 1', "f")]),
    (
        DSML[: DSML.index("now")],
        False,
        [("call", json.dumps({"city": "Kyōto <3", "days": [1, 2]}, ensure_ascii=False), "weather")],
    ),
    (V31.format("none"), False, [("content", V31.format("none"), "")]),
    ("<｜tool▁calls▁begin｜>" + CALL.format("f", "{}"), False, [("call", "{}", "f")]),
    (
        DSML,
        False,
        [
            ("call", json.dumps({"city": "Kyōto <3", "days": [1, 2]}, ensure_ascii=False), "weather"),
            ("call", "{}", "now"),
        ],
    ),
]


@pytest.mark.parametrize(("text", "thinking", "pieces"), CASES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_an_answer_is_the_same_however_it_is_cut(text: str, thinking: bool | None, pieces: list, data) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    assert read(parts, thinking) == pieces
    assert read(list(text), thinking) == pieces


def test_without_tools_a_marker_is_text() -> None:
    assert read([V31.format("x")], tools=False) == [("content", V31.format("x"), "")]


def test_calls_that_are_not_parallel() -> None:
    answer = OutputParser(False, True, max_calls=1)
    both = V31.format(CALL.format("f", "{}") + CALL.format("g", "{}"))
    assert [*answer.push(both + "so"), *answer.finish()] == [Piece("call", "{}", "f"), Piece("content", "so")]


def test_markers_that_the_engine_leaves_out() -> None:
    """A special token has no text, so it is recognized by its id."""
    answer = OutputParser(True, False, {6: "</think>"})
    assert answer.push("hm", (9,)) == [Piece("reasoning", "hm")]
    assert answer.push("", (6,)) == [] and answer.state == "content"
    assert answer.push("yes", (9,)) == [Piece("content", "yes")]


@pytest.fixture(scope="module")
def tokenizer():
    return tokensieve.load_tokenizer("sparse")


def asked(**more) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "hi"}]} | more)


def test_the_bundled_template(tokenizer) -> None:
    template = ChatTemplate(tokenizer)
    assert (
        template.render(asked()).endswith("</think>")
        and template.parser(asked(), template.render(asked())).state == "content"
    )
    for switch in ({"chat_template_kwargs": {"thinking": True}}, {"reasoning_effort": "low"}):
        (name,) = switch
        with pytest.raises(ApiError, match="knows no thinking") as refused:  # the model would never end its thought
            template.render(asked(**switch))
        assert refused.value.param == name
    with pytest.raises(ApiError, match="knows no tools"):
        template.render(asked(tools=[TOOL]))
    said = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": "hi"}]
    assert "Be short." in template.render(asked(messages=said))


def test_a_template_with_tools(tokenizer) -> None:
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.chat_template = TEMPLATE
    template = ChatTemplate(other)
    calls = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]
    messages = [
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ]
    body = asked(messages=messages, tools=[TOOL])
    text = template.render(body)
    assert '"weather"' in text and 'weather<｜tool▁sep｜>{"city": "Rome"}' in text and text.endswith("T:sunnyA:")
    pieces = template.parser(body, text).push(V31.format(CALL.format("weather", "{}")))
    assert pieces == [Piece("call", "{}", "weather")]
    silent = asked(messages=messages[:1], tools=[TOOL], tool_choice="none")
    assert '"weather"' not in template.render(silent)
    assert template.parser(silent, "").push(V31.format("x")) == [Piece("content", V31.format("x"))]


def test_no_template(tokenizer) -> None:
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.chat_template = None
    with pytest.raises(ApiError, match="no chat template"):
        ChatTemplate(other).render(asked())


@pytest.mark.parametrize(
    ("a", "b", "first", "agreement"),
    [
        ([], [], None, 1.0),
        ([1, 2], [1, 2], None, 1.0),
        ([1, 2], [1, 3], 1, 0.5),
        ([1], [1, 2], 1, 0.5),
        ([1, 2], [], 0, 0),
    ],
)
def test_difference(a: list[int], b: list[int], first: int | None, agreement: float) -> None:
    assert difference(a, b) == {"first_difference": first, "agreement": agreement}
