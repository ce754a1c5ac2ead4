"""Calls that an answer has to make: a grammar of their notation, around the JSON schemas of the tools' arguments."""

import json
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from tokensieve.engine.grammar import JSON_SPACES
from tokensieve.serve.chat import BEGIN, CALL, CALL_END, END, SEPARATOR
from tokensieve.serve.errors import ApiError
from tokensieve.serve.schema import ChatRequest, Tool

PROBE = {"type": "function", "function": {"name": "a_function", "arguments": "{}"}}


class ForcedCalls:
    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._added = {token.content: id for id, token in added.items()}

    def grammar(self, asked: ChatRequest) -> str:
        """For an answer of nothing but calls, one where a function is named or they may not be parallel.

        ApiError where the template writes calls otherwise.
        """
        if not self._is_known:
            raise ApiError(400, "calls can only be asked for in the notation of DeepSeek-V3.1; use auto", "tool_choice")
        calls = "call+" if asked.parallel_tool_calls and asked.tool_choice == "required" else "call"
        functions = [f"function_{i}" for i in range(len(asked.callable))]
        rules = [
            f"start: {self._marker(BEGIN)} {calls} {self._marker(END)}",
            f"call: {self._marker(CALL)} ({' | '.join(functions)}) {self._marker(CALL_END)}",
            *(f"{rule}: {self._function(tool)}" for rule, tool in zip(functions, asked.callable, strict=True)),
        ]
        return "\n".join(rules)

    def _function(self, tool: Tool) -> str:
        # without parameters a function takes none
        parameters = tool.function.parameters or {"additionalProperties": False}
        arguments = {"type": "object", **parameters, "x-guidance": JSON_SPACES}
        return f"{_text(tool.function.name)} {self._marker(SEPARATOR)} %json {json.dumps(arguments)}"

    def _marker(self, marker: str) -> str:
        """The token, where there is one: spelled in letters it would mean something else to the model."""
        return f"<[{self._added[marker]}]>" if marker in self._added else _text(marker)

    @cached_property
    def _is_known(self) -> bool:
        """Whether the template writes a call in the notation that the grammar has."""
        said = [{"role": "user", "content": ""}, {"role": "assistant", "content": "", "tool_calls": [PROBE]}]
        try:
            text = self._tokenizer.apply_chat_template(said, tokenize=False)
        except (TemplateError, TypeError, KeyError, ValueError):
            return False
        return f"{BEGIN}{CALL}a_function{SEPARATOR}{{}}{CALL_END}" in text


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
