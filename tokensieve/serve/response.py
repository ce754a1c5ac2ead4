"""The engine's outputs as one response: the whole of it, or the chunks of a stream. Formats build its choices."""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from tokensieve.engine import Output
from tokensieve.serve.errors import ApiError, error_body
from tokensieve.serve.record import Record
from tokensieve.serve.schema import Common
from tokensieve.serve.streaming import DONE, event

Json = dict[str, Any]


class ChoiceBuilder(Protocol):
    """Builds one choice from the outputs of one request to the engine.

    `push` returns the choices that a stream shows for an output, and keeps what `whole` returns at the end.
    reasoning_tokens: how many tokens so far were reasoning.
    """

    reasoning_tokens: int

    def push(self, output: Output) -> list[Json]: ...
    def whole(self) -> Json: ...


@dataclass(frozen=True)
class Labels:
    """How a format labels its responses: the prefix of `id`, and the `object` of a whole response and of a chunk."""

    prefix: str
    whole: str
    chunk: str


def choice(**fields: Any) -> Json:
    return {"index": 0, **fields}  # the response builder knows the number


class ResponseBuilder:
    """Numbers the choices and puts them into OpenAI's envelope.

    choices: by the ids of the requests to the engine, in the order of their numbers. prompt: the token ids of the
    prompt, which are part of the response if the request has `return_token_ids`.
    """

    def __init__(
        self,
        labels: Labels,
        body: Common,
        record: Record,
        choices: Mapping[str, ChoiceBuilder],
        prompt: Sequence[int],
    ):
        self._labels, self._body, self._record, self._choices = labels, body, record, choices
        self._prompt = list(prompt) if body.return_token_ids else None
        self._numbers = {id: number for number, id in enumerate(choices)}
        self._new_tokens: dict[str, list[int]] = {id: [] for id in choices}  # ids that no choice has shown yet
        self._created, self._begun = int(time.time()), time.perf_counter()

    async def whole(self, outputs: AsyncGenerator[Output, None]) -> Json:
        """The response, once the last output has come."""
        async with aclosing(outputs) as stream:
            async for output in stream:
                self._push(output)
        choices = [self._numbered(id, [builder.whole()])[0] for id, builder in self._choices.items()]
        return self._envelope(self._labels.whole, choices, self._usage(), with_prompt=True)

    async def events(self, outputs: AsyncGenerator[Output, None]) -> AsyncGenerator[bytes, None]:
        """The response as server-sent events. ApiError before the first one; later errors are events themselves."""
        options = self._body.stream_options
        wants_usage = options is not None and options.include_usage
        sent = False

        def chunk(choices: list[Json], usage: Json | None = None, **more: Json) -> bytes:
            envelope = self._envelope(self._labels.chunk, choices, usage, with_prompt=not sent)
            if not wants_usage:
                del envelope["usage"]
            return event(envelope | more)

        async with aclosing(outputs) as stream:
            try:
                async for output in stream:
                    if output.reading:
                        yield chunk([], prompt_progress=self._progress(output))
                        sent = True
                        continue
                    for one in self._numbered(output.id, self._push(output)):
                        yield chunk([one])
                        sent = True
            except ApiError as error:
                if not sent:
                    raise
                yield event(error_body(error.status, error.message, error.param, error.code))
                return
        if wants_usage:
            yield chunk([], self._usage())
        yield DONE

    def _progress(self, output: Output) -> Json:
        """llama.cpp's fields. time_ms: since the request was made, because a client waits in the queue too."""
        time_ms = round(1000 * (time.perf_counter() - self._begun))
        counts = {"total": output.prompt_tokens, "cache": output.cached_tokens, "processed": output.read_tokens}
        return counts | {"time_ms": time_ms}

    def _push(self, output: Output) -> list[Json]:
        self._new_tokens[output.id] += output.tokens
        return self._choices[output.id].push(output)

    def _numbered(self, id: str, choices: list[Json]) -> list[Json]:
        for one in choices:
            one["index"] = self._numbers[id]
        if self._prompt is not None and choices:
            choices[0]["token_ids"], self._new_tokens[id] = self._new_tokens[id], []
        return choices

    def _envelope(self, kind: str, choices: list[Json], usage: Json | None, with_prompt: bool) -> Json:
        envelope = {
            "id": f"{self._labels.prefix}-{self._record.id}",
            "object": kind,
            "created": self._created,
            "model": self._body.model,
            "choices": choices,
            "usage": usage,
        }
        if with_prompt and self._prompt is not None:
            envelope["prompt_token_ids"] = self._prompt
        return envelope

    def _usage(self) -> Json:
        record = self._record
        reasoning_tokens = sum(builder.reasoning_tokens for builder in self._choices.values())
        return {
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "total_tokens": record.prompt_tokens + record.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
        }
