"""An answer's text, split into reasoning, content and tool calls as it comes. `markers` has the notations."""

import json
from dataclasses import dataclass
from typing import Any, Literal

from tokensieve.serve.markers import (
    BLOCKS,
    CALL_BEGIN,
    CALL_END,
    CALL_SEPARATOR,
    END_THINK,
    FENCE,
    FENCE_END,
    INVOKE,
    INVOKE_END,
    KIND,
    NAMED,
    PARAMETER,
    THINK,
)


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer: some text, or one whole tool call, whose `text` is its arguments in JSON."""

    kind: Literal["reasoning", "content", "call"]
    text: str
    name: str = ""


class OutputParser:
    """Splits one answer into pieces.

    thinking: whether the answer begins with reasoning; None if it says so itself, by <think>. tools: whether it may
    hold calls. hidden: markers, by token id, that the engine leaves out of the text because they are special tokens.
    max_calls: later calls are left out.
    """

    def __init__(
        self, thinking: bool | None, tools: bool, hidden: dict[int, str] | None = None, max_calls: int | None = None
    ):
        self._tools, self._hidden, self._max_calls = tools, hidden or {}, max_calls
        self._calls = 0
        self._may_think = thinking is None
        self.state: Literal["reasoning", "content", "calls"] = "reasoning" if thinking else "content"
        self._pending = ""
        self._block = ""  # the marker that began the current block, until a call of that block is complete

    def push(self, text: str, tokens: tuple[int, ...] = ()) -> list[Piece]:
        """The pieces that are certain by now. tokens: the ids behind `text`; a hidden marker belongs at its end."""
        self._pending += text + "".join(self._hidden.get(token, "") for token in tokens)
        pieces: list[Piece] = []
        if self._may_think and not self._decide():
            return pieces
        while self._advance(pieces):
            pass
        return pieces

    def _decide(self) -> bool:
        """Whether it is certain by now how the answer begins."""
        begin = self._pending.lstrip()
        if begin.startswith(THINK):
            self.state, self._pending = "reasoning", begin.removeprefix(THINK)
        self._may_think = THINK.startswith(begin)
        return not self._may_think

    def finish(self) -> list[Piece]:
        """The piece that was still pending at the answer's end.

        A call that was cut off has as much of its arguments as arrived; without its whole name it is left out.
        """
        rest, self._pending = self._pending, ""
        if self.state == "calls" and (CALL_BEGIN in rest or INVOKE in rest):
            call = _call(rest[: len(rest) - _overlap(rest, CALL_END)].partition(CALL_BEGIN)[2])
            is_wanted = call is not None and (self._max_calls is None or self._calls < self._max_calls)
            return [call] if call is not None and is_wanted else []
        if self.state == "calls":
            rest = self._block + rest if self._block or rest.strip() else ""
        kind: Literal["reasoning", "content"] = "reasoning" if self.state == "reasoning" else "content"
        return [Piece(kind, rest)] if rest else []

    def _advance(self, pieces: list[Piece]) -> bool:
        """Take one marker or call from the pending text. False if what is left may be the beginning of one."""
        if self.state == "calls":
            return self._advance_calls(pieces)
        markers = [END_THINK] if self.state == "reasoning" else list(BLOCKS) if self._tools else []
        matches = [(at, marker) for marker in markers if (at := self._pending.find(marker)) >= 0]
        if matches:
            at, marker = min(matches)
        else:
            at, marker = len(self._pending) - max((_overlap(self._pending, m) for m in markers), default=0), ""
        if at:
            pieces.append(Piece("reasoning" if self.state == "reasoning" else "content", self._pending[:at]))
        self._pending = self._pending[at + len(marker) :]
        if marker:
            self.state = "content" if self.state == "reasoning" else "calls"
            self._block = "" if self.state == "content" else marker
        return bool(marker)

    def _advance_calls(self, pieces: list[Piece]) -> bool:
        call = _first_call(self._pending)
        ends = [(at, end) for end in BLOCKS.values() if (at := self._pending.find(end)) >= 0]
        if call and (not ends or call[0] < min(ends)[0]):
            if self._max_calls is None or self._calls < self._max_calls:
                pieces.append(call[2])
            self._calls += 1
            self._pending, self._block = self._pending[call[1] :], ""
            return True
        if ends:
            at, end = min(ends)
            if self._block:  # a block without a call is ordinary text
                pieces.append(Piece("content", self._block + self._pending[: at + len(end)]))
            self._pending, self._block, self.state = self._pending[at + len(end) :], "", "content"
            return True
        return False


def _first_call(text: str) -> tuple[int, int, Piece] | None:
    """The first whole call, with its begin and end.

    The search only goes forward: a regular expression would backtrack over calls that are not finished.
    """
    calls = [call for call in (_marked_call(text), _invoked_call(text)) if call]
    return min(calls, key=lambda call: call[0]) if calls else None


def _find_in_order(text: str, marks: tuple[str, ...]) -> list[int] | None:
    """The index of each mark, one after the other, or None if one is missing."""
    indices, at = [], 0
    for mark in marks:
        at = text.find(mark, at)
        if at < 0:
            return None
        indices.append(at)
        at += len(mark)
    return indices


def _marked_call(text: str) -> tuple[int, int, Piece] | None:
    indices = _find_in_order(text, (CALL_BEGIN, CALL_SEPARATOR, CALL_END))
    if indices is None:
        return None
    begin, _, end = indices
    call = _call(text[begin + len(CALL_BEGIN) : end])
    return None if call is None else (begin, end + len(CALL_END), call)


def _call(text: str) -> Piece | None:
    """The call between a call's markers, in the notation of V3.1 or of V3; None without its whole name.

    A function may be named "function" in V3.1's. Its arguments begin with a brace, which no name does.
    """
    name, has_name, arguments = text.partition(CALL_SEPARATOR)
    if name.strip() != KIND or arguments.lstrip().startswith("{"):
        return Piece("call", arguments.strip(), name.strip()) if has_name else None
    named = NAMED.fullmatch(arguments)
    if named is None:
        return None
    arguments = named["rest"].strip().removeprefix(FENCE).removesuffix(FENCE_END).strip()
    return Piece("call", arguments[: len(arguments) - _overlap(arguments, FENCE_END)], named["name"])


def _invoked_call(text: str) -> tuple[int, int, Piece] | None:
    indices = _find_in_order(text, (INVOKE, '">', INVOKE_END))
    if indices is None:
        return None
    begin, middle, end = indices
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
    """How many of the last characters of `text` are the first of `marker`."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])), 0)
