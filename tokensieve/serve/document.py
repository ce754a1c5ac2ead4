"""What /openapi.json says of answers and errors. It describes them only: tests hold it against what is sent."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

STATUSES = {
    400: "Not JSON, a wrong type or value, or a prompt that is too long",
    401: "A key is set, and this is none",
    404: "No such model",
    413: "Too large",
    429: "Too many requests wait; Retry-After says when to ask again",
    500: "A step of the engine failed; the request may be sent again",
    503: "The server is stopping",
}


class Told(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Fault(Told):
    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class Error(Told):
    error: Fault


class Health(Told):
    status: str


class ModelCard(Told):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelCards(Told):
    object: Literal["list"]
    data: list[ModelCard]


class PromptDetails(Told):
    cached_tokens: int


class AnswerDetails(Told):
    reasoning_tokens: int


class Usage(Told):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: AnswerDetails


class Alternative(Told):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(Told):
    content: list[TokenLogprob]


class CalledFunction(Told):
    name: str
    arguments: str


class Call(Told):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Told):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    tool_calls: list[Call] = []


class Choice(Told):
    index: int
    token_ids: list[int] = []


class ChatChoice(Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class CompletionLogprobs(Told):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Whole(Told):
    id: str
    created: int
    model: str
    usage: Usage
    prompt_token_ids: list[int] = []


class Chat(Whole):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Completion(Whole):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Layer(Told):
    layer: int
    read: int
    selected: list[int]
    attention: list[float]
    dense: list[int]
    dense_attention: list[float]
    kept: float


class Lens(Told):
    model: str
    text: str
    starts: list[int]
    context: int
    layers: list[Layer]


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route may answer besides 200."""
    told: dict[int | str, str] = {status: STATUSES[status] for status in sorted({401, *statuses})}
    told["default"] = "Any other error"
    return {status: {"model": Error, "description": said} for status, said in told.items()}


ASKED = errors(400, 404, 413, 429, 500, 503)  # what may come of a request to the engine
METRICS = errors() | {
    200: {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {"type": "string"}}}}
}
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "With stream: chunks as OpenAI has them, then [DONE]",
        "content": {"text/event-stream": {"itemSchema": EVENT}},  # of OpenAPI 3.2
    }
}
