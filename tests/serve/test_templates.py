"""Chat templates that treat calls and thoughts as those of DeepSeek's models do, each in its own way.

R1 and V3 ask whether content is none, and V3.1 whether the key `tool_calls` is there. R1's prompts end with <think>.
"""

import json
from typing import Any

import pytest
from llguidance import LLMatcher
from pydantic import ValidationError
from transformers import AutoTokenizer

import tokensieve
from tokensieve.engine.grammar import Grammars
from tokensieve.engine.request import Sampling
from tokensieve.serve import chat_template
from tokensieve.serve.answer_grammar import AnswerGrammar
from tokensieve.serve.chat_template import ChatTemplate
from tokensieve.serve.errors import ApiError
from tokensieve.serve.markers import V3, V31
from tokensieve.serve.parsing import Piece
from tokensieve.serve.schema import ChatRequest
from tokensieve.tasks import turns

TOOLS = "{% if tools %}{% for t in tools %}{{ t.function.name + ': ' + t.function.description }}{% endfor %}{% endif %}"
V3_CALL = (
    "'<｜tool▁call▁begin｜>' + c.type + '<｜tool▁sep｜>' + c.function.name + '\\n```json\\n' + c.function.arguments"
)
V3_CALL = "{{ " + V3_CALL + " + '\\n```<｜tool▁call▁end｜>' }}{% if not loop.last %}{{ '\\n' }}{% endif %}"
V31_CALL = (
    "{{ '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' + c.function.arguments + '<｜tool▁call▁end｜>' }}"
)
BLOCK = "<｜tool▁calls▁begin｜>{% for c in m['tool_calls'] %}CALL{% endfor %}<｜tool▁calls▁end｜>{{ eos_token }}"
USER = "{{ bos_token }}{% for m in messages %}{% if m.role in ('user', 'tool') %}{{ '<｜User｜>' + m['content'] }}"
ANSWERS = "<｜Assistant｜>{{ m['content'] + eos_token }}"
END = "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>"
TEMPLATES = {
    "R1": f"{TOOLS}{USER}{{% elif m['content'] is none %}}<｜Assistant｜>{BLOCK.replace('CALL', V3_CALL)}"
    f"{{% else %}}{ANSWERS}{END}<think>\n{{% endif %}}",
    "V3-0324": f"{TOOLS}{USER}{{% elif 'tool_calls' in m %}}<｜Assistant｜>{{{{ m['content'] or '' }}}}"
    f"{BLOCK.replace('CALL', V3_CALL)}{{% else %}}{ANSWERS}{END}{{% endif %}}",
    "V3.1": f"{TOOLS}{USER}{{% elif m['tool_calls'] is defined %}}<｜Assistant｜></think>{{{{ m['content'] or '' }}}}"
    f"{BLOCK.replace('CALL', V31_CALL)}{{% else %}}{ANSWERS}{END}"
    "{{ '<think>' if thinking else '</think>' }}{% endif %}",
    # as Qwen's: arguments are a mapping, which tojson would write twice if it were JSON already
    "mapping": f"{USER}{{% else %}}{{{{ m.content }}}}{{% for c in m.tool_calls %}}{{{{ c.function.name }}}}"
    f"{{{{ c.function.arguments | tojson }}}}{{% endfor %}}{END}{{% endif %}}",
}
DEEPSEEK = ["R1", "V3-0324", "V3.1"]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
ASK, RESULT = {"role": "user", "content": "Rome?"}, {"role": "tool", "tool_call_id": "1", "content": "sunny"}
TOOL = {"type": "function", "function": {"name": "weather"}}
WRITTEN = {"R1": 'weather\n```json\n{"city": "Rome"}\n```', "V3.1": '<｜tool▁sep｜>{"city": "Rome"}'}
WRITTEN |= {"V3-0324": WRITTEN["R1"], "mapping": 'weather{"city": "Rome"}'}


@pytest.fixture(scope="module")
def path() -> str:
    return tokensieve.load_tokenizer("sparse").name_or_path


def tokenizer_of(path: str, name: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def asked(*messages: dict[str, Any], **more: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [ASK, *messages]} | more)


@pytest.mark.parametrize("name", TEMPLATES)
def test_history_is_written_whole(path: str, name: str) -> None:
    template = ChatTemplate(tokenizer_of(path, name))
    for called in (
        {"content": None, "tool_calls": [CALL]},
        {"content": "", "tool_calls": [CALL]},
        {"tool_calls": [CALL]},
        {"content": None, "function_call": CALL["function"]},
    ):
        text = template.render(asked({"role": "assistant", **called}, RESULT))
        assert WRITTEN[name] in text and "sunny" in text and "None" not in text
    for said in ({"content": "Hello.", "tool_calls": []}, {"content": "Hello.", "tool_calls": None}):
        assert "Hello." in template.render(asked({"role": "assistant", **said}, ASK))
    both = asked({"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]}, RESULT)
    if name == "R1":
        with pytest.raises(ApiError, match="content or its tool_calls, not both"):
            template.render(both)
    else:
        assert "Let me look." in template.render(both) and WRITTEN[name] in template.render(both)


@pytest.mark.parametrize("name", DEEPSEEK)
def test_a_template_tells_its_notation(path: str, name: str) -> None:
    template = ChatTemplate(tokenizer_of(path, name))
    assert template.notation == (V31 if name == "V3.1" else V3)
    body = asked(tools=[TOOL])
    text = template.render(body)  # though the tool has no description
    history = ChatTemplate(tokenizer_of(path, name)).render(
        asked({"role": "assistant", "content": None, "tool_calls": [CALL]}, add_generation_prompt=False)
    )
    block = history[history.index("<｜tool▁calls▁begin｜>") : history.index("<｜tool▁calls▁end｜>")]
    answer = ("hm</think>" if text.rstrip().endswith("<think>") else "") + block
    assert template.parser(body, text).push(answer)[-1] == Piece("call", '{"city": "Rome"}', "weather")


def test_a_thought_that_is_not_wanted_is_closed(path: str) -> None:
    template = ChatTemplate(tokenizer_of(path, "R1"))
    for switch in (
        {"reasoning_effort": "none"},
        {"thinking": {"type": "disabled"}},
        {"chat_template_kwargs": {"thinking": False}},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        body = asked(**switch)
        text = template.render(body)
        assert text.endswith("<｜Assistant｜><think>\n\n</think>\n\n")
        assert template.parser(body, text).state == "content"
    for wanted in ({}, {"reasoning_effort": "high"}, {"reasoning_effort": "max"}, {"thinking": {"type": "enabled"}}):
        body = asked(**wanted)
        text = template.render(body)
        assert text.endswith("<think>\n") and template.parser(body, text).state == "reasoning"
    switched = ChatTemplate(tokenizer_of(path, "V3.1"))
    assert switched.render(asked(thinking={"type": "enabled"})).endswith("<think>")
    assert switched.render(asked()).endswith("</think>")


SHAPE = {"type": "json_schema", "json_schema": {"schema": {"enum": [7]}}}
CALLED = {
    V3: "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{}\n```<｜tool▁call▁end｜>",
    V31: "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
}


def may_be(tokenizer: Any, body: ChatRequest, notation: Any, thinks: bool, answer: str) -> bool:
    constraint = AnswerGrammar(tokenizer).constraint(body, notation, thinks)
    matcher = Grammars(tokenizer, len(tokenizer)).matcher(Sampling(**constraint))
    assert matcher is not None
    inner: LLMatcher = matcher._matcher
    tokens = tokenizer(answer, add_special_tokens=False).input_ids
    return inner.validate_tokens(tokens) == len(tokens) and inner.consume_tokens(tokens) and inner.is_accepting()


@pytest.mark.parametrize("notation", [V3, V31])
@pytest.mark.parametrize("thinks", [True, False])
def test_what_is_demanded_follows_the_thought(path: str, notation: Any, thinks: bool) -> None:
    tokenizer, thought = AutoTokenizer.from_pretrained(path), "so {\n</think>" if thinks else ""
    calls = CALLED[notation] + "<｜tool▁calls▁end｜>"
    shaped = asked(response_format=SHAPE)
    assert may_be(tokenizer, shaped, None, thinks, thought + "7")
    assert not may_be(tokenizer, shaped, None, thinks, thought + "8")
    for choice in ("required", "any"):
        demanded = asked(tools=[TOOL], tool_choice=choice)
        assert may_be(tokenizer, demanded, notation, thinks, thought + calls)
        assert not may_be(tokenizer, demanded, notation, thinks, thought + "7")
    either = asked(tools=[TOOL], response_format=SHAPE)
    assert may_be(tokenizer, either, notation, thinks, thought + calls)
    assert may_be(tokenizer, either, notation, thinks, thought + "7")
    assert not may_be(tokenizer, either, notation, thinks, thought + "8")


def test_the_last_message_is_continued(path: str) -> None:
    for name in DEEPSEEK:
        template = ChatTemplate(tokenizer_of(path, name))
        for how in ({"continue_final_message": True, "add_generation_prompt": False}, {}):
            last = {"role": "assistant", "content": "It is ", **({} if how else {"prefix": True})}
            body = asked(last, **how)
            text = template.render(body)
            assert text.endswith("<｜Assistant｜>It is ") and template.parser(body, text).state == "content"


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        *(
            ([named(name)], "cannot be a name")
            for name in ('a"b', "a\nb", "a\0b", "", "<｜tool▁sep｜>", "a b", "x" * 129)
        ),
        ([named("a"), named("a")], "'a' twice"),
        ([{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}], "no object"),
    ],
)
def test_tools_that_cannot_be_called(tools: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        asked(tools=tools)
    assert asked(tools=[named("server.a-b_1/c"), named("A")]).tools


def test_the_mapping_of_arguments(path: str) -> None:
    template = ChatTemplate(tokenizer_of(path, "mapping"))
    cut = {**CALL, "function": {"name": "weather", "arguments": '{"city'}}
    with pytest.raises(ApiError, match="no JSON object"):
        template.render(asked({"role": "assistant", "tool_calls": [cut]}))
    assert json.loads(template.render(asked({"role": "assistant", "tool_calls": [CALL]})).partition("weather")[2][:16])


def test_a_template_that_does_not_end_is_an_error(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while it is tried with a call, and then once instead of in all forms of a call."""
    calls: list[Any] = []

    def render(*given: Any, **options: Any) -> str:
        calls.append(given)
        return turns.render(*given, **options)

    monkeypatch.setattr(turns, "LONGEST", 0.25)
    monkeypatch.setattr(chat_template, "render", render)
    tokenizer = AutoTokenizer.from_pretrained(path)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = "{{ tools }}" + loops
    template = ChatTemplate(tokenizer)
    with pytest.raises(ApiError, match=r"does not end within 0.25 s; correct chat_template.jinja") as error:
        template.render(asked())
    assert error.value.status == 400
    with pytest.raises(turns.EndlessTemplate):
        template.render(asked(tools=[TOOL]))
    assert len(calls) == 2
