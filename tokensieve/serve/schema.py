"""The fields of requests. Names and meanings are OpenAI's; a field that is not supported is refused, never ignored."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, model_validator

from tokensieve.engine import Sampling
from tokensieve.engine.request import COLDEST, MOST_BIASES
from tokensieve.serve.fields import (
    ChosenTool,
    Message,
    ResponseFormat,
    Strict,
    TemplateOptions,
    Thinking,
    Tool,
    fault,
)

MAX_CHOICES = 128  # of one response, as at OpenAI
ALL_ROOM = -1  # as a limit of tokens: as many as there is room for
# Far more than a conversation has; to check a million takes seconds in which no other answer is sent.
MAX_MESSAGES = 2**14
MAX_TOOLS = 2**10

# Fields that Sampling has by the same name.
SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
# Fields of OpenAI and of vLLM that do not change an answer here.
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("prediction", "verbosity", "priority", "request_id"),
)
# Fields that would change it, with the values that do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),  # in a chat
    "suffix": ("",),
    "modalities": (["text"],),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
}


def _is_number(token: str) -> bool:
    return token.isascii() and token.isdigit() and len(token) < 10


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = True  # of chunk lengths; nothing is added to chunks either way


class Common(Strict, ABC):
    """The fields that chat and text completions share.

    PROMPT: the field that holds the prompt. DEFAULT_TOKENS: limit of an answer if the request gives none.
    """

    PROMPT: ClassVar[str]
    DEFAULT_TOKENS: ClassVar[int]

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, Field(ge=ALL_ROOM)] = None
    min_tokens: Annotated[int, Field(ge=0)] = 0  # from vLLM
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool = False  # from vLLM
    seed: int | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    return_token_ids: bool = False  # from vLLM
    return_progress: bool = False  # from llama.cpp

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        unsupported = {name: neutral for name, neutral in NEUTRAL.items() if name not in cls.model_fields}
        for name, neutral in unsupported.items():
            if values.get(name) is not None and values[name] not in neutral:
                raise fault(name, "is not supported; leave it out")
        biases = values.get("logit_bias")
        if isinstance(biases, dict) and (len(biases) > MOST_BIASES or not all(map(_is_number, biases))):
            raise fault("logit_bias", f"names up to {MOST_BIASES} tokens, by their numbers")
        ignored = {*IGNORED, *unsupported}
        return {key: value for key, value in values.items() if key not in ignored and value is not None}

    @model_validator(mode="after")
    def _check(self) -> "Common":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream: true")
        if self.return_progress and not self.stream:
            raise ValueError("return_progress is for stream: true")
        if self.limit == 0 and not self.may_be_silent:
            raise fault(self.limit_name, "is 0; it must be at least 1, or -1 for all the room there is")
        if self.limit not in (None, ALL_ROOM) and self.min_tokens > self.limit:
            raise fault("min_tokens", f"is {self.min_tokens}, more than {self.limit_name}; lower it")
        return self

    @property
    def may_be_silent(self) -> bool:
        """Whether an answer of no tokens makes sense."""
        return False

    @property
    def limit(self) -> int | None:
        """Tokens of an answer at most, if the request gives a limit. ALL_ROOM stands for all that fit."""
        return self.max_tokens

    @property
    def limit_name(self) -> str:
        """The field that gives the limit."""
        return "max_tokens"

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """How many alternatives to report with each token's log probability. None: no log probabilities."""

    @property
    def prompt_alternatives(self) -> int | None:
        """The same for the tokens of the prompt."""
        return None

    def sampling(self, max_tokens: int, seed: int, constraint: Mapping[str, Any]) -> Sampling:
        """What the request asks of the engine's sampling. constraint: the `schema` or the `grammar` of Sampling.

        OpenAI's defaults hold for what is not given: a temperature of 1, and no cut. UserError for values out of range.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        values = {name: value for name in SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        if 0 < values.get("temperature", 1) < COLDEST:
            values["temperature"] = 0  # which makes no difference
        if values.get("top_k") == -1:
            values["top_k"] = 0  # vLLM writes -1 for all
        biases = self.logit_bias or {}
        return Sampling(
            max_tokens=max_tokens,
            min_tokens=min(self.min_tokens, max_tokens),
            seed=seed,
            stop=tuple(stop),
            logprobs=self.alternatives,
            prompt_logprobs=self.prompt_alternatives,
            ignore_eos=self.ignore_eos,
            logit_bias=tuple((int(token), bias) for token, bias in biases.items()),
            **constraint,
            **{"temperature": 1.0} | values,
        )


class ChatRequest(Common):
    PROMPT, DEFAULT_TOKENS = "messages", 4096

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int | None, Field(ge=ALL_ROOM)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required", "any"] | ChosenTool = "auto"  # "any": "required" at Mistral
    parallel_tool_calls: bool = True
    chat_template_kwargs: TemplateOptions | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    continue_final_message: bool = False  # from vLLM, as the next one
    add_generation_prompt: bool | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_name(self) -> str:
        return "max_tokens" if self.max_tokens == self.limit else "max_completion_tokens"

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def switches(self) -> dict[str, bool]:
        """Whether each of the request's switches for thinking turns it on, by the name of its field.

        The first decides. An effort is weaker than the others: clients send one by habit.
        """
        template = self.chat_template_kwargs or TemplateOptions()
        switches = {
            "chat_template_kwargs": template.thinking if template.enable_thinking is None else template.enable_thinking,
            "thinking": None if self.thinking is None else self.thinking.type == "enabled",
            "reasoning_effort": None if self.reasoning_effort is None else self.reasoning_effort != "none",
        }
        return {name: on for name, on in switches.items() if on is not None}

    @property
    def thinks(self) -> bool | None:
        """Whether the answer shall begin with a thought. None leaves it to the template."""
        return next(iter(self.switches.values()), None)

    @property
    def continues(self) -> bool:
        """Whether the answer goes on after the last message's text, instead of being a message of its own."""
        return self.continue_final_message or self.messages[-1].prefix

    @property
    def callable(self) -> list[Tool]:
        """The tools that the answer may call."""
        choice = self.tool_choice
        if isinstance(choice, ChosenTool):
            return [tool for tool in self.tools or () if tool.function.name == choice.function.name]
        return [] if choice == "none" else self.tools or []

    @property
    def names_function(self) -> bool:
        return isinstance(self.tool_choice, ChosenTool)

    @property
    def must_call(self) -> bool:
        return self.tool_choice not in ("none", "auto")

    @property
    def schema_(self) -> dict[str, Any] | None:
        return None if self.response_format is None else self.response_format.wanted

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs are for logprobs: true")
        if self.must_call and not self.callable:
            raise ValueError("tool_choice asks for a tool that is not among tools; add it")
        names = [tool.function.name for tool in self.tools or ()]
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise fault("tools", f"has the name {twice!r} twice; give each function its own")
        template = self.chat_template_kwargs
        if template and {template.thinking, template.enable_thinking} == {True, False}:
            raise fault("chat_template_kwargs", "says both that the model thinks and that it does not; leave one out")
        if self.min_tokens and (self.schema_ is not None or self.must_call):
            raise fault("min_tokens", "is not for an answer in a JSON schema or of required calls; leave it out")
        if any(message.prefix for message in self.messages[:-1]):
            raise fault("messages", "has a prefix that is not the last message; put it last")
        if self.continues:
            self._check_continued()
        return self

    def _check_continued(self) -> None:
        last = self.messages[-1]
        name = "continue_final_message" if self.continue_final_message else "messages"
        if last.role != "assistant" or not last.text.strip() or last.tool_calls:
            raise fault(name, "goes on after a last message of the assistant with a text and no calls; add one")
        if self.add_generation_prompt:
            raise fault("add_generation_prompt", "begins a message, and continue_final_message goes on with one")
        if self.schema_ is not None or self.must_call:
            raise fault(name, "is not for an answer in a JSON schema or of required calls, which begin anew")


# Only the first wrong item of a list is reported: to make a million errors takes minutes.
Ids = Annotated[list[int], Field(fail_fast=True)]


class CompletionRequest(Common):
    PROMPT, DEFAULT_TOKENS = "prompt", 16  # as at OpenAI

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(fail_fast=True, max_length=MAX_CHOICES)]
        | Annotated[list[Ids], Field(fail_fast=True, max_length=MAX_CHOICES)]
    )
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    echo: bool = False

    @property
    def may_be_silent(self) -> bool:
        return self.echo

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompt_alternatives(self) -> int | None:
        return self.logprobs if self.echo else None

    @property
    def prompts(self) -> list[str | list[int]]:
        several = isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int)
        return cast("list[str | list[int]]", self.prompt if several else [self.prompt])

    @model_validator(mode="after")
    def _check_prompts(self) -> "CompletionRequest":
        count = len(self.prompts)
        if count * self.n > MAX_CHOICES:
            raise ValueError(
                f"{count} prompts with n = {self.n} are more than {MAX_CHOICES} answers; send them in several requests"
            )
        for name in ("return_token_ids", "return_progress"):
            if count > 1 and getattr(self, name):
                raise ValueError(f"{name} is for one prompt; send the others on their own")
        return self
