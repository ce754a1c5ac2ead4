"""Messages to the text of a prompt, by the model's chat template; and the parser for the answer to that prompt."""

import json
import re
from functools import cached_property
from typing import Any

from tokensieve.config import UserError
from tokensieve.serve.errors import ApiError
from tokensieve.serve.fields import Message
from tokensieve.serve.markers import (
    CALL_BEGIN,
    CALL_END,
    CALL_SEPARATOR,
    CALLS_BEGIN,
    CALLS_END,
    DSML,
    END_THINK,
    INVOKE,
    NO_THOUGHT,
    THINK,
    V3,
    V31,
    Notation,
)
from tokensieve.serve.parsing import OutputParser
from tokensieve.serve.schema import ChatRequest
from tokensieve.tasks.turns import EndlessTemplate, render

NAME, ARGUMENTS, TEXT = "a_function", {"a_key": "a_value"}, "a_text"  # of the calls by which a template is tried
SWITCHES = re.compile(r"\b(enable_thinking|thinking|reasoning_effort)\b")


class ChatTemplate:
    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._special = {id: token.content for id, token in added.items() if token.special}

    def render(self, body: ChatRequest) -> str:
        """The prompt. ApiError if the template refuses the messages, or does not know a feature that they use."""
        if not self._tokenizer.chat_template:
            raise ApiError(400, "the model's tokenizer has no chat template; use /v1/completions", "messages")
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if body.callable else None
        source = self._tokenizer.get_chat_template(tools=tools)
        if tools and not re.search(r"\btools\b", source):
            raise ApiError(400, "the model's chat template knows no tools; leave it out", "tools")
        if tools and not self.reads_calls:
            raise ApiError(400, "the model's chat template writes calls in no known notation; leave tools out", "tools")
        options: dict[str, Any] = {"tools": tools}
        if body.continues:
            options |= {"continue_final_message": True, "add_generation_prompt": False}
        else:
            options["add_generation_prompt"] = body.add_generation_prompt is not False
        if body.reasoning_effort is not None:
            options["reasoning_effort"] = body.reasoning_effort
        if body.thinks is not None:
            options |= {"thinking": body.thinks, "enable_thinking": body.thinks}
        try:
            text = render(self._tokenizer, [self._plain(message) for message in body.messages], **options)
        except UserError as error:
            raise ApiError(400, str(error), "messages") from error
        return self._with_thought(body, text, source)

    def _with_thought(self, body: ChatRequest, text: str, source: str) -> str:
        """The prompt with its thought closed if the template begins one that the request does not want.

        ApiError if the request wants one and the template neither begins one nor has a switch.
        """
        begins = text.rstrip().endswith(THINK)
        if body.thinks and not begins and not SWITCHES.search(source):
            name = next(iter(body.switches))
            raise ApiError(400, f"the model's chat template knows no thinking; leave {name} out", name)
        if body.thinks is False and begins and not body.continues:
            return text.rstrip().removesuffix(THINK) + NO_THOUGHT
        return text

    def thinking(self, body: ChatRequest, prompt: str) -> bool | None:
        """Whether the answer to this prompt begins within a thought. None: it begins one itself if the model does."""
        if body.continues:
            text = body.messages[-1].text
            return text.rfind(THINK) > text.rfind(END_THINK)
        end = prompt.rstrip()
        return True if end.endswith(THINK) else False if end.endswith(END_THINK) else None

    def parser(self, body: ChatRequest, prompt: str) -> OutputParser:
        """A parser for one answer to this prompt."""
        tools, thinking = bool(body.callable), self.thinking(body, prompt)
        markers = {True: {END_THINK}, False: set(), None: {THINK, END_THINK}}[thinking]
        markers |= {CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_SEPARATOR, CALL_END, DSML} if tools else set()
        hidden = {id: text for id, text in self._special.items() if text in markers}
        return OutputParser(thinking, tools, hidden, None if body.parallel_tool_calls else 1)

    @property
    def reads_calls(self) -> bool:
        """Whether the template writes calls in a notation that `parsing` reads."""
        return self.notation is not None or f'{INVOKE}{NAME}"' in self._tried

    @cached_property
    def notation(self) -> Notation | None:
        """The notation of the template's calls, if their arguments are JSON."""
        return next(
            (
                n
                for n in (V31, V3)
                if "".join(
                    (
                        *n.before,
                        NAME,
                        *n.between,
                        "{",
                    )
                )
                in self._tried
            ),
            None,
        )

    # A template may ask whether a message has a content, and lose its calls or text if it has one, or none. It may want
    # the arguments as JSON or as a mapping. So it is tried with a call, and gets calls in the first form that it keeps.

    @cached_property
    def _form(self) -> tuple[str | None, bool] | None:
        """The content of a message that has calls but no text, and whether arguments are JSON; None: it knows none."""
        forms = [(content, is_json) for is_json in (True, False) for content in ("", None)]
        return next((form for form in forms if self._keeps(*form)), None)

    @cached_property
    def _tried(self) -> str:
        return "" if self._form is None else self._try(*self._form)

    @cached_property
    def _keeps_text(self) -> bool:
        """Whether a message may have both a text and calls."""
        return self._form is not None and self._keeps(TEXT, self._form[1])

    def _keeps(self, content: str | None, is_json: bool) -> bool:
        text, words = self._try(content, is_json), (NAME, *ARGUMENTS, *ARGUMENTS.values(), content or "")
        return all(word in text for word in words) and '\\"' not in text  # in JSON once, not twice

    def _try(self, content: str | None, is_json: bool) -> str:
        """What the template writes for a message with a call; nothing if it fails. EndlessTemplate as for `render`."""
        arguments = json.dumps(ARGUMENTS) if is_json else ARGUMENTS
        call = {"id": "a_call", "type": "function", "function": {"name": NAME, "arguments": arguments}}
        called = {"role": "assistant", "content": content, "tool_calls": [call]}
        try:
            return render(self._tokenizer, [{"role": "user", "content": ""}, called])
        except EndlessTemplate:  # whatever the form of the call
            raise
        except UserError:
            return ""

    def _plain(self, message: Message) -> dict[str, Any]:
        """A message as the template expects it: parts joined to one text, and no key for what the message lacks."""
        plain = message.model_dump(exclude_none=True, exclude={"prefix", "tool_calls"}) | {"content": message.text}
        if message.role == "developer":
            plain["role"] = "system"
        if not message.tool_calls:
            return plain
        if self._form is None:
            raise ApiError(400, "the model's chat template knows no tool_calls; leave them out", "messages")
        content, is_json = self._form
        if message.text and not self._keeps_text:
            wrong = "the model's chat template writes a message's content or its tool_calls, not both; leave one out"
            raise ApiError(400, wrong, "messages")
        calls = [call.model_dump(exclude_none=True) for call in message.tool_calls]
        for call in calls if not is_json else ():
            call["function"]["arguments"] = _mapping(call["function"]["arguments"])
        return plain | {"content": message.text or content, "tool_calls": calls}


def _mapping(arguments: str) -> dict[str, Any]:
    try:
        mapping = json.loads(arguments or "{}")
    except ValueError:
        mapping = None
    if not isinstance(mapping, dict):
        raise ApiError(400, "the arguments of a call are no JSON object, as the chat template wants them", "messages")
    return mapping
