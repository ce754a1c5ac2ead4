"""Parts of requests: messages, tools, and the forms of answers."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_PARTS = 2**12  # of one message, and tool calls of one message

# A name stands unquoted in prompts and in grammars. OpenAI allows letters, digits, "_" and "-"; tools of other
# protocols are also named by paths.
TOOL_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")


def fault(name: str, wrong: str) -> PydanticCustomError:
    """An error that names its parameter."""
    name = name.encode(errors="backslashreplace").decode()  # it may hold half a surrogate pair
    return PydanticCustomError("parameter", "{param} {wrong}", {"param": name, "wrong": wrong})


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
            raise fault(unknown[:100], "is unknown; leave it out")
        return values


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
    """prefix: DeepSeek's own way to ask that the answer goes on after this message, the last one."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_PARTS)] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    prefix: bool = False

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, values: Any) -> Any:
        """Older and other names: `function_call` and the role `function`, `reasoning`, and a `refusal` as the text."""
        if not isinstance(values, dict):
            return values
        values = {name: value for name, value in values.items() if value is not None}
        if "function_call" in values and "tool_calls" not in values:
            values["tool_calls"] = [{"type": "function", "function": values["function_call"]}]
        if values.get("role") == "function":
            values["role"] = "tool"
        for other, name in (("reasoning", "reasoning_content"), ("refusal", "content")):
            if other in values:
                values.setdefault(name, values[other])
        return values

    @property
    def text(self) -> str:
        """The content; its parts joined."""
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)


class ToolFunction(Typed):
    """description: templates join it to other text, so it is never missing."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check(self) -> "ToolFunction":
        if not TOOL_NAME.fullmatch(self.name):
            raise ValueError(f"{self.name[:100]!r} cannot be a name; use up to 128 letters, digits and _ - . : /")
        if self.parameters.get("type", "object") != "object":
            raise ValueError(f'the parameters of {self.name} are no object; give their schema the type "object"')
        return self


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
    """Switches of chat templates: DeepSeek's and the one that most others have."""

    thinking: bool | None = None
    enable_thinking: bool | None = None


class Thinking(Strict):
    type: Literal["enabled", "disabled"]
