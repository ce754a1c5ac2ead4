"""Tool calls that a request requires: a grammar of their notation around the JSON schemas of the tools' arguments."""

import json
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from tokensieve.engine.grammar import JSON_SPACES
from tokensieve.serve.errors import ApiError
from tokensieve.serve.markers import CALL_BEGIN, CALL_END, CALL_SEPARATOR, CALLS_BEGIN, CALLS_END
from tokensieve.serve.schema import ChatRequest, Tool

PROBE = {"type": "function", "function": {"name": "a_function", "arguments": "{}"}}


class ForcedCalls:
    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._added = {token.content: id for id, token in added.items()}

    def grammar(self, body: ChatRequest) -> str:
        """A grammar for an answer that consists of calls only; of one call if a function is named or parallel calls
        are off.

        ApiError if the template writes calls in another notation.
        """
        if not self._is_known:
            raise ApiError(400, "calls can only be asked for in the notation of DeepSeek-V3.1; use auto", "tool_choice")
        calls = "call+" if body.parallel_tool_calls and body.tool_choice == "required" else "call"
        functions = [f"function_{i}" for i in range(len(body.callable))]
        rules = [
            f"start: {self._marker(CALLS_BEGIN)} {calls} {self._marker(CALLS_END)}",
            f"call: {self._marker(CALL_BEGIN)} ({' | '.join(functions)}) {self._marker(CALL_END)}",
            *(f"{rule}: {self._function(tool)}" for rule, tool in zip(functions, body.callable, strict=True)),
        ]
        return "\n".join(rules)

    def _function(self, tool: Tool) -> str:
        # a function without parameters takes none
        parameters = tool.function.parameters or {"additionalProperties": False}
        arguments = {"type": "object", **parameters, "x-guidance": JSON_SPACES}
        return f"{_text(tool.function.name)} {self._marker(CALL_SEPARATOR)} %json {json.dumps(arguments)}"

    def _marker(self, marker: str) -> str:
        """The marker's token if it has one. Spelled out in letters it would mean something else to the model."""
        return f"<[{self._added[marker]}]>" if marker in self._added else _text(marker)

    @cached_property
    def _is_known(self) -> bool:
        """Whether the template writes a call in the grammar's notation."""
        messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": "", "tool_calls": [PROBE]}]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, TypeError, KeyError, ValueError):
            return False
        return f"{CALLS_BEGIN}{CALL_BEGIN}a_function{CALL_SEPARATOR}{{}}{CALL_END}" in text


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
