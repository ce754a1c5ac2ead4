"""From a checked request to its response: prompt, requests to the engine, outputs, response builder."""

import itertools
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

import tokensieve.engine as engine
from tokensieve.engine import Output, Service
from tokensieve.serve.engine_requests import engine_request
from tokensieve.serve.errors import ApiError, prompt_too_long
from tokensieve.serve.metrics import Metrics
from tokensieve.serve.record import Record, record_of
from tokensieve.serve.response import ChoiceBuilder, Labels, ResponseBuilder
from tokensieve.serve.schema import ALL_ROOM, Common
from tokensieve.serve.settings import ServeConfig
from tokensieve.serve.streaming import begin_stream, unless_gone

# Between the seeds of a request's choices: far from those of a request with the next seed.
SEED_STRIDE = 0x9E3779B97F4A7C15

Body = TypeVar("Body", bound=Common, contravariant=True)


@dataclass(frozen=True)
class Prepared:
    """What a format makes of a request.

    prompts: token ids. choice: a new builder of one choice, given the id of its request to the engine and the number of
    its prompt. constraint: the `schema` or the `grammar` of Sampling.
    """

    prompts: Sequence[Sequence[int]]
    choice: Callable[[str, int], ChoiceBuilder]
    constraint: Mapping[str, Any] = field(default_factory=dict)


class Format(Protocol[Body]):
    """A kind of request and response. `prepare` may take long and runs in a worker thread; it raises ApiError."""

    labels: Labels

    def prepare(self, body: Body) -> Prepared: ...


class Handler:
    """on_complete: called with every request to the engine that has its whole answer, and with the answer's tokens."""

    def __init__(
        self,
        service: Service,
        config: ServeConfig,
        metrics: Metrics,
        on_complete: Callable[[engine.Request, Sequence[int]], None],
    ):
        self._service, self._config, self._metrics, self._on_complete = service, config, metrics, on_complete

    async def respond(self, request: Request, body: Body, format: Format[Body]) -> Response:
        """The whole response, or a stream of it. ApiError, UserError and UnknownModel for what is refused."""
        selector = self._config.selector_of(body.model)  # an unknown model is refused before anything is tokenized
        record = record_of(request)
        prepared = await run_in_threadpool(format.prepare, body)  # a long text would block all other requests
        requests = self._engine_requests(body, prepared, selector, record)
        choices = {one.id: prepared.choice(one.id, number // body.n) for number, one in enumerate(requests)}
        response = ResponseBuilder(format.labels, body, record, choices, requests[0].prompt)
        outputs = self._outputs(requests, body.n, record)
        if body.stream:
            return await begin_stream(request.receive, response.events(outputs))
        return JSONResponse(await unless_gone(request.receive, response.whole(outputs)))

    def _engine_requests(self, body: Common, prepared: Prepared, selector: str, record: Record) -> list[engine.Request]:
        """`body.n` requests for each prompt, numbered prompt by prompt."""
        config, longest = self._config, self._service.engine.longest
        prompts = prepared.prompts
        room, length = min(config.max_prompt_tokens or longest, longest - 1), max(map(len, prompts))
        if length > room:
            raise prompt_too_long(f"{length} tokens", room, body.PROMPT)
        # Clients ask for more than there is room for, and expect to get what there is.
        limit = min(config.max_tokens or longest, longest - min(map(len, prompts)))
        wanted = {None: body.DEFAULT_TOKENS, ALL_ROOM: limit}.get(body.limit, body.limit)
        # The mirror repeats the draws, so the seed is fixed now. OpenAI's seeds may be negative.
        seed = random.getrandbits(63) if body.seed is None else body.seed
        seed += 2**64 if -(2**63) <= seed < 0 else 0
        first = body.sampling(min(wanted, limit), seed, prepared.constraint)
        samplings = [first, *(replace(first, seed=(seed + i * SEED_STRIDE) % 2**64) for i in range(1, body.n))]
        record.model, record.prompt_tokens = body.model, sum(map(len, prompts))
        requests = [
            engine_request(f"{record.id}-{i}" if i else record.id, prompt, sampling, selector)
            for i, (prompt, sampling) in enumerate(itertools.product(map(tuple, prompts), samplings))
        ]
        # all have the same prompt, and the first one reads it
        return [replace(requests[0], progress=body.return_progress), *requests[1:]]

    async def _outputs(self, requests: list[engine.Request], n: int, record: Record) -> AsyncGenerator[Output, None]:
        """The engine's outputs, counted. ApiError if a request ends without an answer."""
        metrics, model, begin = self._metrics, record.model, time.perf_counter()
        tokens: dict[str, list[int]] = {one.id: [] for one in requests}
        last, finished = dict.fromkeys(tokens, begin), 0
        first_of_prompts = {one.id for one in requests[::n]}  # the other requests have the same prompts
        try:
            async with aclosing(self._service.stream(*requests)) as stream:
                async for output in stream:
                    now, answer = time.perf_counter(), tokens[output.id]
                    if output.tokens:
                        seconds = metrics.next_token if answer else metrics.first_token
                        seconds.labels(model).observe(now - last[output.id])
                        last[output.id] = now
                        if not answer and output.id in first_of_prompts:
                            record.cached_tokens += output.cached_tokens
                    answer += output.tokens
                    record.completion_tokens += len(output.tokens)
                    finished += output.finish is not None
                    if finished == len(requests) or output.finish in ("error", "abort"):
                        record.finish = output.finish
                    _raise_failure(output)
                    yield output
            for one in requests:
                self._on_complete(one, tokens[one.id])
        finally:
            if record.completion_tokens:
                record.finish = record.finish or "abort"
                metrics.prompt_tokens.labels(model).inc(record.prompt_tokens)
                metrics.cached_tokens.labels(model).inc(record.cached_tokens)
                metrics.completion_tokens.labels(model).inc(record.completion_tokens)


def _raise_failure(output: Output) -> None:
    """ApiError for an output that ends its request without an answer."""
    if output.refused:
        raise ApiError(400, output.error)
    if output.finish == "error":
        raise ApiError(500, output.error, code="engine_error")
    if output.finish == "abort":
        raise ApiError(503, "the server is stopping", code="unavailable")
