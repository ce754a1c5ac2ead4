"""The responses in /openapi.json. The models only document what the routes send, and tests compare the two.

They are not openai.types: those are a client's, without our fields, and openai is no dependency of the server.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

STATUSES = {
    400: "The body is not JSON, a value is wrong, or the prompt is too long",
    401: "The API key is missing or wrong",
    403: "The request comes from a page of another site, or names the server by an unknown host",
    404: "No such model",
    408: "The body did not arrive in time",
    413: "The body is too large, or holds too many values",
    415: "The body's Content-Encoding is none that is read",
    429: "The queue is full; Retry-After gives the seconds to wait",
    500: "A step of the engine failed; the message says whether the request may be sent again",
    503: "The server is stopping",
}


class Closed(BaseModel):
    """A model that lists all its fields."""

    model_config = ConfigDict(extra="forbid")


class Fault(Closed):
    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class Error(Closed):
    error: Fault


class Health(Closed):
    status: str


class ModelCard(Closed):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    index_topk: int | None


class ModelCards(Closed):
    object: Literal["list"]
    data: list[ModelCard]


class PromptDetails(Closed):
    cached_tokens: int


class AnswerDetails(Closed):
    reasoning_tokens: int


class Usage(Closed):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: AnswerDetails


class Alternative(Closed):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Alternative):
    top_logprobs: list[Alternative]


class ChatLogprobs(Closed):
    content: list[TokenLogprob]


class CalledFunction(Closed):
    name: str
    arguments: str


class Call(Closed):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Closed):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    tool_calls: list[Call] = []


class Choice(Closed):
    index: int
    token_ids: list[int] = []


class ChatChoice(Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class CompletionLogprobs(Closed):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Whole(Closed):
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


class Layer(Closed):
    layer: int
    read: int
    selected: list[int]
    attention: list[float]
    dense: list[int]
    dense_attention: list[float]
    kept: float


class Lens(Closed):
    model: str
    text: str
    starts: list[int]
    context: int
    markers: list[int]
    layers: list[Layer]


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The statuses of a route besides 200."""
    texts: dict[int | str, str] = {status: STATUSES[status] for status in sorted({401, *statuses})}
    texts["default"] = "Any other error"
    return {status: {"model": Error, "description": text} for status, text in texts.items()}


ENGINE = errors(400, 403, 404, 408, 413, 415, 429, 500, 503)  # of a route that sends requests to the engine
METRICS = errors() | {
    200: {"description": "Prometheus' text format", "content": {"text/plain": {"schema": {"type": "string"}}}}
}
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "With `stream`: OpenAI's chunks, then [DONE]",
        "content": {"text/event-stream": {"itemSchema": EVENT}},  # since OpenAPI 3.2
    }
}
