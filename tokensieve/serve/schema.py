"""What a request may say. Names and meanings are OpenAI's; what is not supported is refused, and not overlooked."""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from tokensieve.engine import Sampling
from tokensieve.engine.request import COLDEST, MOST_BIASES

MOST_ANSWERS = 128  # to one request, as OpenAI has it

# What a request says of the draws, and Sampling by the same name.
PLAIN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
# They change nothing of the answer here: OpenAI's, and vLLM's.
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("prediction", "verbosity", "priority", "request_id"),
)
# They would change it; their neutral values are harmless.
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
    """An error that says which parameter it is about."""
    name = name.encode(errors="backslashreplace").decode()  # it may hold half a character
    return PydanticCustomError("parameter", "{param} {wrong}", {"param": name, "wrong": wrong})


def _is_number(token: str) -> bool:
    return token.isascii() and token.isdigit() and len(token) < 10


class Typed(BaseModel):
    """Types as they are said: no number out of a string. What else it says is left to later versions of the interface."""

    model_config = ConfigDict(strict=True)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _know(cls, given: Any) -> Any:
        """The first unknown name says enough: a hundred thousand errors take a second."""
        unknown = (
            next((name for name in given if name not in cls.model_fields), None) if isinstance(given, dict) else None
        )
        if unknown is not None:
            raise _fault(unknown[:100], "is unknown; leave it out")
        return given


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = True  # of the chunks' lengths: nothing is added to them either way


class Common(Strict):
    """Of both routes."""

    model: str
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
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
    ignore_eos: bool = False  # as vLLM has it
    seed: int | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    return_token_ids: bool = False  # as vLLM has it

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, neutral in NEUTRAL.items():
            if given.get(name) is not None and given[name] not in neutral:
                raise _fault(name, "is not supported; leave it out")
        biases = given.get("logit_bias")
        if isinstance(biases, dict) and (len(biases) > MOST_BIASES or not all(map(_is_number, biases))):
            raise _fault("logit_bias", f"names up to {MOST_BIASES} tokens, by their numbers")
        left_out = {*IGNORED, *NEUTRAL}
        return {key: value for key, value in given.items() if key not in left_out and value is not None}

    @model_validator(mode="after")
    def _check(self) -> "Common":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream: true")
        return self

    def sampling(self, max_tokens: int, seed: int, logprobs: int | None, **obeys: Any) -> Sampling:
        """UserError for values outside of their ranges. Where nothing is said, OpenAI's values: a temperature of 1, and no cut."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        said = {name: value for name in PLAIN if (value := getattr(self, name)) is not None}
        if 0 < said.get("temperature", 1) < COLDEST:
            said["temperature"] = 0  # to which it makes no difference
        if said.get("top_k") == -1:
            said["top_k"] = 0  # all, as vLLM says it
        biases = self.logit_bias or {}
        return Sampling(
            max_tokens=max_tokens,
            seed=seed,
            stop=tuple(stop),
            logprobs=logprobs,
            ignore_eos=self.ignore_eos,
            logit_bias=tuple((int(token), bias) for token, bias in biases.items()),
            **obeys,
            **{"temperature": 1.0} | said,
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
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class ToolFunction(Typed):
    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] = {}
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


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
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: TemplateOptions | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None

    @property
    def thinking(self) -> bool:
        """The template's switch where it is given; otherwise any effort but none."""
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


Ids = Annotated[
    list[int], Field(fail_fast=True)
]  # a list's first wrong item says enough: a million of them take minutes


class CompletionRequest(Common):
    prompt: str | Ids | Annotated[list[str], Field(fail_fast=True)] | Annotated[list[Ids], Field(fail_fast=True)]
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        several = isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int)
        return cast("list[str] | list[list[int]]", self.prompt if several else [self.prompt])

    @model_validator(mode="after")
    def _check_prompts(self) -> "CompletionRequest":
        count = len(self.prompts)
        if count * self.n > MOST_ANSWERS:
            raise ValueError(
                f"{count} prompts with n = {self.n} are more than {MOST_ANSWERS} answers; send them in several requests"
            )
        if count > 1 and self.return_token_ids:
            raise ValueError("return_token_ids is for one prompt; send the others on their own")
        return self
