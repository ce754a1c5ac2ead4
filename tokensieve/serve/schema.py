"""The fields of requests. Names and meanings are OpenAI's; a field that is not supported is refused, never ignored."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from tokensieve.engine import Sampling
from tokensieve.engine.request import COLDEST, MOST_BIASES

MAX_CHOICES = 128  # of one response, as at OpenAI
# Far more than a conversation has; to check a million takes seconds in which no other answer is sent.
MAX_MESSAGES = 2**14
MAX_PARTS = 2**12  # of one message, and tool calls of one message
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
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
}


def _fault(name: str, wrong: str) -> PydanticCustomError:
    """An error that names its parameter."""
    name = name.encode(errors="backslashreplace").decode()  # it may hold half a surrogate pair
    return PydanticCustomError("parameter", "{param} {wrong}", {"param": name, "wrong": wrong})


def _is_number(token: str) -> bool:
    return token.isascii() and token.isdigit() and len(token) < 10


class Typed(BaseModel):
    """Values are not converted, as a string to a number. Unknown fields are ignored: later clients may have more."""

    model_config = ConfigDict(strict=True)


class Strict(BaseModel):
    """Values are not converted, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        """Only the first unknown name is reported: to make a hundred thousand errors takes a second."""
        names = values if isinstance(values, dict) else ()
        unknown = next((name for name in names if name not in cls.model_fields), None)
        if unknown is not None:
            raise _fault(unknown[:100], "is unknown; leave it out")
        return values


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = True  # of chunk lengths; nothing is added to chunks either way


class Common(Strict):
    """The fields that chat and text completions share.

    PROMPT: the field that holds the prompt. DEFAULT_TOKENS: limit of an answer if the request gives none.
    """

    PROMPT: ClassVar[str]
    DEFAULT_TOKENS: ClassVar[int]

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
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

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, neutral in NEUTRAL.items():
            if values.get(name) is not None and values[name] not in neutral:
                raise _fault(name, "is not supported; leave it out")
        biases = values.get("logit_bias")
        if isinstance(biases, dict) and (len(biases) > MOST_BIASES or not all(map(_is_number, biases))):
            raise _fault("logit_bias", f"names up to {MOST_BIASES} tokens, by their numbers")
        ignored = {*IGNORED, *NEUTRAL}
        return {key: value for key, value in values.items() if key not in ignored and value is not None}

    @model_validator(mode="after")
    def _check(self) -> "Common":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream: true")
        return self

    @property
    def limit(self) -> int | None:
        """Tokens of an answer at most, if the request gives a limit."""
        return self.max_tokens

    @property
    def limit_name(self) -> str:
        """The field that gives the limit."""
        return "max_tokens"

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report with each token's log probability. None: no log probabilities."""
        raise NotImplementedError

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
            seed=seed,
            stop=tuple(stop),
            logprobs=self.alternatives,
            ignore_eos=self.ignore_eos,
            logit_bias=tuple((int(token), bias) for token, bias in biases.items()),
            **constraint,
            **{"temperature": 1.0} | values,
        )


class Part(Typed):
    type: Literal["text"]
    text: str


class Function(Typed):
    name: str
    arguments: str


class ToolCall(Typed):
    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(Typed):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class ToolFunction(Typed):
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] = {}
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class Tool(Typed):
    type: Literal["function"]
    function: ToolFunction


class ChosenFunction(Typed):
    name: str


class ChosenTool(Typed):
    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Typed):
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def wanted(self) -> dict[str, Any] | None:
        """The JSON schema of the answer; None for any text."""
        if self.type == "text":
            return None
        return {"type": "object"} if self.json_schema is None else self.json_schema.schema_

    @model_validator(mode="after")
    def _check(self) -> "ResponseFormat":
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise ValueError("json_schema belongs to type json_schema, and to no other")
        return self


class TemplateOptions(Strict):
    thinking: bool | None = None


class ChatRequest(Common):
    PROMPT, DEFAULT_TOKENS = "messages", 4096

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: TemplateOptions | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None

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
    def thinking(self) -> bool:
        """The template's switch if the request sets it; otherwise whether it asks for any effort but none."""
        switch = self.chat_template_kwargs.thinking if self.chat_template_kwargs else None
        return self.reasoning_effort not in (None, "none") if switch is None else switch

    @property
    def callable(self) -> list[Tool]:
        """The tools that the answer may call."""
        choice = self.tool_choice
        if isinstance(choice, ChosenTool):
            return [tool for tool in self.tools or () if tool.function.name == choice.function.name]
        return [] if choice == "none" else self.tools or []

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
        if self.schema_ is not None and self.thinking:
            raise ValueError("response_format holds from the first token on; leave it out, or thinking")
        if self.schema_ is not None and self.callable:
            raise ValueError("response_format and tools exclude each other; leave one out")
        if self.must_call and not self.callable:
            raise ValueError("tool_choice asks for a tool that is not among tools; add it")
        if self.must_call and self.thinking:
            raise ValueError("tool_choice holds from the first token on; leave it out, or thinking")
        return self


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

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        several = isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int)
        return cast("list[str] | list[list[int]]", self.prompt if several else [self.prompt])

    @model_validator(mode="after")
    def _check_prompts(self) -> "CompletionRequest":
        count = len(self.prompts)
        if count * self.n > MAX_CHOICES:
            raise ValueError(
                f"{count} prompts with n = {self.n} are more than {MAX_CHOICES} answers; send them in several requests"
            )
        if count > 1 and self.return_token_ids:
            raise ValueError("return_token_ids is for one prompt; send the others on their own")
        return self
