"""Answers in a form that a request demands, after the thought if there is one: a JSON schema, or calls of functions."""

import json
from typing import Any

from tokensieve.engine.grammar import JSON_SPACES, LONGEST_SCHEMA
from tokensieve.serve.errors import ApiError
from tokensieve.serve.fields import Tool
from tokensieve.serve.markers import CALLS_BEGIN, CALLS_END, END_THINK, Notation
from tokensieve.serve.schema import ChatRequest


class AnswerGrammar:
    def __init__(self, tokenizer: Any):
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._added = {token.content: id for id, token in added.items()}

    def constraint(self, body: ChatRequest, notation: Notation | None, thinks: bool) -> dict[str, Any]:
        """The `schema` or the `grammar` of Sampling for this request's answer; neither if it may be any text.

        notation: of the template's calls. thinks: whether the answer begins within a thought. ApiError for calls in a
        notation that no grammar describes, and for a schema that is too long.
        """
        schema = body.schema_
        # checked once here, and not by the engine for each of the choices
        if schema is not None and len(json.dumps(schema)) > LONGEST_SCHEMA:
            raise ApiError(400, f"the JSON schema has more than {LONGEST_SCHEMA} characters", "response_format")
        calls = body.callable if body.must_call or schema is not None else []
        if calls and notation is None:
            name = "tool_choice" if body.must_call else "response_format"
            raise ApiError(400, f"{name} and tools need a chat template that writes calls with JSON arguments", name)
        if not calls and not thinks:
            return {} if schema is None else {"schema": schema}
        answers = [*(["calls"] if calls else []), *([] if schema is None or body.must_call else ["text"])]
        if not answers:
            return {}
        rules = [f"start: {'thought ' if thinks else ''}({' | '.join(answers)})"]
        rules += self._thought() if thinks else []
        rules += [f"text: {_json(schema)}"] if schema is not None and "text" in answers else []
        rules += self._calls(body, notation) if notation is not None and calls else []
        return {"grammar": "\n".join(rules)}

    def _thought(self) -> list[str]:
        if END_THINK in self._added:  # text never contains an added token
            return [f"thought: THOUGHT {self._token(END_THINK)}", r"THOUGHT: /(.|\n)*/"]
        return [rf"thought[suffix={_text(END_THINK)}]: /(.|\n)*/"]

    def _calls(self, body: ChatRequest, notation: Notation) -> list[str]:
        """Rules for an answer of calls only; of one call if a function is named or parallel calls are off."""
        may_be_several = body.parallel_tool_calls and not body.names_function
        functions = [f"function_{i}" for i in range(len(body.callable))]
        more = f"({self._all(notation.apart)} call)*" if may_be_several else ""
        return [
            f"calls: {self._token(CALLS_BEGIN)} call {more} {self._token(CALLS_END)}",
            f"call: {self._all(notation.before)} ({' | '.join(functions)}) {self._all(notation.after)}",
            *(f"{rule}: {self._function(tool, notation)}" for rule, tool in zip(functions, body.callable, strict=True)),
        ]

    def _function(self, tool: Tool, notation: Notation) -> str:
        # a function without parameters takes none
        parameters = tool.function.parameters or {"additionalProperties": False}
        return f"{_text(tool.function.name)} {self._all(notation.between)} {_json({'type': 'object', **parameters})}"

    def _all(self, parts: tuple[str, ...]) -> str:
        return " ".join(map(self._token, parts))

    def _token(self, text: str) -> str:
        """A marker's token if it has one. Spelled out in letters it would mean something else to the model."""
        return f"<[{self._added[text]}]>" if text in self._added else _text(text)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps(schema | {'x-guidance': JSON_SPACES})}"
