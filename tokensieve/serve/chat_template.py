"""Messages to the text of a prompt, by the model's chat template; and the parser for the answer to that prompt."""

import re
from typing import Any

from jinja2 import TemplateError

from tokensieve.serve.errors import ApiError
from tokensieve.serve.markers import (
    CALL_BEGIN,
    CALL_END,
    CALL_SEPARATOR,
    CALLS_BEGIN,
    CALLS_END,
    DSML,
    END_THINK,
    THINK,
)
from tokensieve.serve.parsing import OutputParser
from tokensieve.serve.schema import ChatRequest, Message


class ChatTemplate:
    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._template: str = tokenizer.get_chat_template() if tokenizer.chat_template else ""
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._special = {id: token.content for id, token in added.items() if token.special}

    def render(self, body: ChatRequest) -> str:
        """The prompt. ApiError if the template refuses the messages, or does not know a feature that they use."""
        if not self._template:
            raise ApiError(400, "the model's tokenizer has no chat template; use /v1/completions", "messages")
        features = {
            "tools": bool(body.callable),
            "tool_calls": any(m.tool_calls for m in body.messages),
            "thinking": body.thinking,
        }
        for name, is_used in features.items():
            if is_used and not re.search(rf"\b{name}\b", self._template):
                raise ApiError(400, f"the model's chat template knows no {name}; leave it out", name)
        try:
            tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
            return self._tokenizer.apply_chat_template(
                [_plain(message) for message in body.messages],
                tools=tools if body.callable else None,
                add_generation_prompt=True,
                tokenize=False,
                thinking=body.thinking,
            )
        except (TemplateError, TypeError, KeyError, ValueError, RecursionError) as error:
            raise ApiError(400, f"the model's chat template refuses these messages: {error}", "messages") from error

    def parser(self, body: ChatRequest, prompt: str) -> OutputParser:
        """A parser for one answer to this prompt."""
        tools = bool(body.callable)
        thinking = prompt.rstrip().endswith(THINK)
        markers = {END_THINK} if thinking else set()
        markers |= {CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_SEPARATOR, CALL_END, DSML} if tools else set()
        hidden = {id: text for id, text in self._special.items() if text in markers}
        return OutputParser(thinking, tools, hidden, None if body.parallel_tool_calls else 1)


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates expect it: parts joined to one text, and an empty text beside calls that have none."""
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    plain = message.model_dump(exclude_none=True) | {"content": content or ""}
    return plain | {"role": "system"} if message.role == "developer" else plain
