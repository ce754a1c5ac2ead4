"""Messages to the prompt's text, and an answer's text back to reasoning, content and tool calls.

Tool calls come in one of two notations: that of DeepSeek-V3.1 and V3.2-Exp,
`<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜><｜tool▁calls▁end｜>`, and that of DeepSeek-V3.2
(`encoding_dsv32.py` beside its weights): `<｜DSML｜function_calls>` around `<｜DSML｜invoke name="NAME">`, around a
`<｜DSML｜parameter name="NAME" string="true|false">VALUE</｜DSML｜parameter>` for each argument.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from tokensieve.serve.errors import ApiError
from tokensieve.serve.schema import ChatRequest, Message

END_THINK = "</think>"
THINK = "<think>"
DSML = "｜DSML｜"
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
BLOCKS = {BEGIN: END, f"<{DSML}function_calls>": f"</{DSML}function_calls>"}
INVOKE, INVOKE_END = f'<{DSML}invoke name="', f"</{DSML}invoke>"
PARAMETER = re.compile(
    f'<{DSML}parameter name="(?P<name>[^"]*)" string="(?P<string>true|false)">(?P<value>.*?)</{DSML}parameter>',
    re.DOTALL,
)


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer: text, or one whole tool call, whose `text` is its arguments in JSON."""

    kind: Literal["reasoning", "content", "call"]
    text: str
    name: str = ""


class Chats:
    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._template: str = tokenizer.get_chat_template() if tokenizer.chat_template else ""
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._special = {id: token.content for id, token in added.items() if token.special}

    def text(self, asked: ChatRequest) -> str:
        """The prompt. ApiError where the model's template cannot say it."""
        if not self._template:
            raise ApiError(400, "the model's tokenizer has no chat template; use /v1/completions", "messages")
        used = {
            "tools": bool(asked.callable),
            "tool_calls": any(m.tool_calls for m in asked.messages),
            "thinking": asked.thinking,
        }
        for name, is_used in used.items():
            if is_used and not re.search(rf"\b{name}\b", self._template):
                raise ApiError(400, f"the model's chat template knows no {name}; leave it out", name)
        try:
            tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()]
            return self._tokenizer.apply_chat_template(
                [_plain(message) for message in asked.messages],
                tools=tools if asked.callable else None,
                add_generation_prompt=True,
                tokenize=False,
                thinking=asked.thinking,
            )
        except (TemplateError, TypeError, KeyError, ValueError, RecursionError) as error:
            raise ApiError(400, f"the model's chat template refuses these messages: {error}", "messages") from error

    def answer(self, asked: ChatRequest, prompt: str) -> "Answer":
        """Whoever reads the answer to this prompt."""
        tools = bool(asked.callable)
        thinking = prompt.rstrip().endswith(THINK)
        wanted = {END_THINK} if thinking else set()
        wanted |= {BEGIN, END, CALL, SEPARATOR, CALL_END, DSML} if tools else set()
        hidden = {id: text for id, text in self._special.items() if text in wanted}
        return Answer(thinking, tools, hidden, None if asked.parallel_tool_calls else 1)


def _plain(message: Message) -> dict[str, Any]:
    """As templates expect it: text for parts of text, and a text where there is none but a call."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    plain = message.model_dump(exclude_none=True) | {"content": content or ""}
    return plain | {"role": "system"} if message.role == "developer" else plain


class Answer:
    """Takes an answer apart as it comes. hidden: markers that the engine leaves out of the text, as a tokenizer's special tokens are.
    most_calls: those after them are left out."""

    def __init__(
        self, thinking: bool, tools: bool, hidden: dict[int, str] | None = None, most_calls: int | None = None
    ):
        self._tools, self._hidden, self._most_calls = tools, hidden or {}, most_calls
        self._calls = 0
        self.state: Literal["reasoning", "content", "calls"] = "reasoning" if thinking else "content"
        self._held = ""
        self._block = ""  # the marker that the calls began with, while no call of it is complete

    def push(self, text: str, tokens: tuple[int, ...] = ()) -> list[Piece]:
        """What is certain by now. tokens: those that `text` came with; a hidden marker stands at its end."""
        self._held += text + "".join(self._hidden.get(token, "") for token in tokens)
        pieces: list[Piece] = []
        while self._advance(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back. A call that was cut off is one with as much of its arguments as there is; without its name, nothing."""
        rest, self._held = self._held, ""
        if self.state == "calls" and (CALL in rest or INVOKE in rest):
            name, begun, arguments = rest.partition(CALL)[2].partition(SEPARATOR)
            wanted = begun and (self._most_calls is None or self._calls < self._most_calls)
            arguments = arguments[: len(arguments) - _overlap(arguments, CALL_END)]
            return [Piece("call", arguments.strip(), name.strip())] if wanted else []
        if self.state == "calls":
            rest = self._block + rest if self._block or rest.strip() else ""
        kind: Literal["reasoning", "content"] = "reasoning" if self.state == "reasoning" else "content"
        return [Piece(kind, rest)] if rest else []

    def _advance(self, pieces: list[Piece]) -> bool:
        """One marker or call further; False where the rest may be the beginning of one."""
        if self.state == "calls":
            return self._advance_calls(pieces)
        markers = [END_THINK] if self.state == "reasoning" else list(BLOCKS) if self._tools else []
        found = [(at, marker) for marker in markers if (at := self._held.find(marker)) >= 0]
        if found:
            at, marker = min(found)
        else:
            at, marker = len(self._held) - max((_overlap(self._held, m) for m in markers), default=0), ""
        if at:
            pieces.append(Piece("reasoning" if self.state == "reasoning" else "content", self._held[:at]))
        self._held = self._held[at + len(marker) :]
        if marker:
            self.state = "content" if self.state == "reasoning" else "calls"
            self._block = "" if self.state == "content" else marker
        return bool(marker)

    def _advance_calls(self, pieces: list[Piece]) -> bool:
        call = _first_call(self._held)
        ends = [(at, end) for end in BLOCKS.values() if (at := self._held.find(end)) >= 0]
        if call and (not ends or call[0] < min(ends)[0]):
            if self._most_calls is None or self._calls < self._most_calls:
                pieces.append(call[2])
            self._calls += 1
            self._held, self._block = self._held[call[1] :], ""
            return True
        if ends:
            at, end = min(ends)
            if self._block:  # without a call in it: text like any other
                pieces.append(Piece("content", self._block + self._held[: at + len(end)]))
            self._held, self._block, self.state = self._held[at + len(end) :], "", "content"
            return True
        return False


def _first_call(text: str) -> tuple[int, int, Piece] | None:
    """Where the first whole call begins and ends. By searching forward only: a pattern would take its time with unfinished ones."""
    found = [call for call in (_marked_call(text), _invoked_call(text)) if call]
    return min(found, key=lambda call: call[0]) if found else None


def _between(text: str, marks: tuple[str, ...]) -> list[int] | None:
    """Where each of the marks begins, one after the other, or None."""
    places, at = [], 0
    for mark in marks:
        at = text.find(mark, at)
        if at < 0:
            return None
        places.append(at)
        at += len(mark)
    return places


def _marked_call(text: str) -> tuple[int, int, Piece] | None:
    places = _between(text, (CALL, SEPARATOR, CALL_END))
    if places is None:
        return None
    begin, middle, end = places
    name, arguments = text[begin + len(CALL) : middle], text[middle + len(SEPARATOR) : end]
    return begin, end + len(CALL_END), Piece("call", arguments.strip(), name.strip())


def _invoked_call(text: str) -> tuple[int, int, Piece] | None:
    places = _between(text, (INVOKE, '">', INVOKE_END))
    if places is None:
        return None
    begin, middle, end = places
    values = {
        p["name"]: p["value"] if p["string"] == "true" else _json(p["value"])
        for p in PARAMETER.finditer(text, middle + 2, end)
    }
    arguments = json.dumps(values, ensure_ascii=False)
    return begin, end + len(INVOKE_END), Piece("call", arguments, text[begin + len(INVOKE) : middle])


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _overlap(text: str, marker: str) -> int:
    """How many of the last characters of `text` begin `marker`."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])), 0)
