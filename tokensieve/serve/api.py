"""The routes. A request becomes one of the engine's, its outputs become an answer; what lies between is in the files beside this one."""

import itertools
import json
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer

import tokensieve.engine as engine
from tokensieve.engine import Output, Service
from tokensieve.engine.grammar import LONGEST_SCHEMA
from tokensieve.serve import document, errors, lens, page, uploads
from tokensieve.serve.answers import Answering, ChatAnswer, CompletionAnswer, Reply, TokenTexts, usage_of
from tokensieve.serve.chat import Chats
from tokensieve.serve.errors import ApiError, error_body
from tokensieve.serve.forced import ForcedCalls
from tokensieve.serve.gate import Gate, Record
from tokensieve.serve.metrics import Metrics
from tokensieve.serve.mirror import Mirror
from tokensieve.serve.schema import ChatRequest, Common, CompletionRequest
from tokensieve.serve.settings import ServeConfig
from tokensieve.serve.streaming import EventStream, event, unless_gone

# Of an answer that does not say how many; a completion's as OpenAI has it.
CHAT_TOKENS, COMPLETION_TOKENS = 4096, 16
# Between the seeds of a request's answers: far from those of a request with the next seed.
SEED_STRIDE = 0x9E3779B97F4A7C15


class Answers:
    """From a checked request to a response."""

    def __init__(self, service: Service, metrics: Metrics, mirror: Mirror, config: ServeConfig):
        self._service, self._metrics, self._mirror, self._config = service, metrics, mirror, config

    def ask(
        self,
        body: Common,
        record: Record,
        prompts: list[list[int]],
        max_tokens: int | None,
        usual: int,
        logprobs: int | None,
        **obeys: Any,
    ) -> list[engine.Request]:
        """`body.n` requests for each prompt. ApiError and UserError for what may not be asked. usual: tokens of an answer where nothing
        is said. obeys: the `schema` or `grammar` of Sampling."""
        config, longest = self._config, self._service.engine.longest
        most, length = min(config.max_prompt_tokens or longest, longest - 1), max(map(len, prompts))
        if length > most:
            raise ApiError(
                400,
                too_long(f"{length} tokens", most),
                "messages" if isinstance(body, ChatRequest) else "prompt",
                "context_length_exceeded",
            )
        room = config.max_tokens or longest
        if max_tokens is not None and max_tokens > room:
            name = "max_tokens" if body.max_tokens == max_tokens else "max_completion_tokens"
            raise ApiError(400, f"{name} is {max_tokens} and may be {room}", name)
        # of a seed that is known, since the mirror's draws are the same; OpenAI's have a sign
        seed = random.getrandbits(63) if body.seed is None else body.seed
        seed += 2**64 if -(2**63) <= seed < 0 else 0
        first = body.sampling(max_tokens or min(usual, room), seed, logprobs, **obeys)
        samplings = [first, *(replace(first, seed=(seed + i * SEED_STRIDE) % 2**64) for i in range(1, body.n))]
        record.model, record.prompt_tokens = body.model, sum(map(len, prompts))
        selection = config.selection_of(body.model)
        return [
            engine.Request(f"{record.id}-{i}" if i else record.id, prompt, sampling, selection)
            for i, (prompt, sampling) in enumerate(itertools.product(map(tuple, prompts), samplings))
        ]

    async def respond(
        self, request: Request, body: Common, asked: list[engine.Request], answers: Sequence[Answering], record: Record
    ) -> Response:
        """answers: one for each of `asked`."""
        by_id = {one.id: answer for one, answer in zip(asked, answers, strict=True)}
        reply = Reply(by_id, asked[0].prompt if body.return_token_ids else None)
        outputs = self._outputs(asked, body.n, record)
        if body.stream:
            wants_usage = body.stream_options is not None and body.stream_options.include_usage
            events = self._events(outputs, reply, wants_usage, record)
            # the first one before the status is sent: what is refused has a status of its own
            first = await unless_gone(request.receive, _first(events))
            return EventStream(_joined(first, events))
        await unless_gone(request.receive, _all(outputs, reply))
        usage = usage_of(record, reply.reasoning_tokens)
        return JSONResponse(reply.envelope(reply.whole(), usage) | reply.head())

    async def _outputs(self, asked: list[engine.Request], n: int, record: Record) -> AsyncGenerator[Output, None]:
        """What the engine says, counted. ApiError where it ends without an answer."""
        metrics, model, begin = self._metrics, record.model, time.perf_counter()
        tokens: dict[str, list[int]] = {one.id: [] for one in asked}
        last, finished = dict.fromkeys(tokens, begin), 0
        of_prompts = {one.id for one in asked[::n]}  # the others' prompts are the same ones
        try:
            async with aclosing(self._service.stream(*asked)) as stream:
                async for output in stream:
                    now, its = time.perf_counter(), tokens[output.id]
                    if output.tokens:
                        (metrics.next_token if its else metrics.first_token).labels(model).observe(
                            now - last[output.id]
                        )
                        last[output.id] = now
                        if not its and output.id in of_prompts:
                            record.cached_tokens += output.cached_tokens
                    its += output.tokens
                    record.completion_tokens += len(output.tokens)
                    finished += output.finish is not None
                    if finished == len(asked) or output.finish in ("error", "abort"):
                        record.finish = output.finish
                    if output.refused:
                        raise ApiError(400, output.error)
                    if output.finish == "error":
                        raise ApiError(500, f"{output.error}; the request may be sent again", code="engine_error")
                    if output.finish == "abort":
                        raise ApiError(503, "the server is stopping", code="unavailable")
                    yield output
            for one in asked:
                self._mirror.consider(one, tokens[one.id])
        finally:
            if record.completion_tokens:
                record.finish = record.finish or "abort"
                metrics.prompt_tokens.labels(model).inc(record.prompt_tokens)
                metrics.cached_tokens.labels(model).inc(record.cached_tokens)
                metrics.completion_tokens.labels(model).inc(record.completion_tokens)

    async def _events(
        self, outputs: AsyncGenerator[Output, None], reply: Reply, wants_usage: bool, record: Record
    ) -> AsyncGenerator[bytes, None]:
        sent = False

        def chunk(choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
            whole = reply.envelope(choices, usage, chunk=True) | ({} if sent else reply.head())
            if not wants_usage:
                del whole["usage"]
            return event(whole)

        async with aclosing(outputs) as stream:
            try:
                async for output in stream:
                    for choice in reply.chunks(output):
                        yield chunk([choice])
                        sent = True
            except ApiError as error:
                if not sent:
                    raise
                yield event(error_body(error.status, error.message, error.param, error.code))
                return
        if wants_usage:
            yield chunk([], usage_of(record, reply.reasoning_tokens))
        yield b"data: [DONE]\n\n"


def too_long(length: str, most: int) -> str:
    """In the words by which clients recognize it, and then shorten what they send."""
    return f"this model's maximum context length is {most} tokens, and the prompt has {length}; shorten it"


async def _first(events: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(events)


async def _joined(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events) as rest:
        yield first
        async for chunk in rest:
            yield chunk


async def _all(outputs: AsyncGenerator[Output, None], reply: Reply) -> None:
    async with aclosing(outputs) as stream:
        async for output in stream:
            reply.push(output)


def create_app(service: Service, tokenizer: Any, config: ServeConfig) -> FastAPI:
    """The application. Its lifespan starts the service, and stops it after the last request."""
    metrics, mirror = Metrics(service), Mirror(service, config.mirror)
    answers, chats, texts = Answers(service, metrics, mirror, config), Chats(tokenizer), TokenTexts(tokenizer)
    forced, begun = ForcedCalls(tokenizer), int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await anyio.to_thread.run_sync(service.stop)

    app = FastAPI(title="tokensieve", lifespan=lifespan)
    app.add_middleware(Gate, config=config, metrics=metrics)
    errors.install(app)

    # for the document: the gate looks at the key, before anything else does
    keyed = APIRouter(dependencies=[Depends(HTTPBearer(auto_error=False))] if config.keys else [])
    keyed.include_router(lens.router(service, tokenizer, config))

    longest_context = service.engine.longest

    def known(model: str) -> dict[str, Any]:
        config.selection_of(model)
        return {
            "id": model,
            "object": "model",
            "created": begun,
            "owned_by": "tokensieve",
            "max_model_len": longest_context,
        }

    # No token of a byte-level tokenizer stands for more characters than it is written with.
    longest = longest_context * max(map(len, tokenizer.get_vocab()))

    def tokens_of(text: str) -> list[int]:
        if len(text) > longest:
            raise ApiError(400, too_long(f"{len(text)} characters", longest_context), None, "context_length_exceeded")
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ApiError(400, "the prompt holds half of a surrogate pair, which is no character")
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    def completion_prompt(prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        first, tokens = tokenizer.bos_token_id, tokens_of(prompt)
        return tokens if first is None or tokens[:1] == [first] else [first, *tokens]

    def obeyed(body: ChatRequest) -> dict[str, Any]:
        if body.must_call:
            return {"grammar": forced.grammar(body)}
        # once, and not again for each of the answers
        if body.schema_ is not None and len(json.dumps(body.schema_)) > LONGEST_SCHEMA:
            raise ApiError(400, f"the JSON schema has more than {LONGEST_SCHEMA} characters", "response_format")
        return {"schema": body.schema_}

    @app.get("/health", response_model=document.Health, responses={503: {"model": document.Health}})
    async def health() -> Response:
        fine = service.alive and not service.draining
        status = "ok" if fine else "draining" if service.alive else "the engine does not run"
        return JSONResponse({"status": status}, 200 if fine else 503)

    @keyed.get("/metrics", response_class=Response, responses=document.METRICS)
    async def metrics_page() -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")

    @keyed.get("/v1/models", response_model=document.ModelCards, responses=document.errors())
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [known(name) for name in config.models]}

    @keyed.get("/v1/models/{model:path}", response_model=document.ModelCard, responses=document.errors(404))
    async def model(model: str) -> dict[str, Any]:
        return known(model)

    @keyed.post("/v1/chat/completions", response_model=document.Chat, responses=document.ASKED | document.STREAM)
    async def chat(body: ChatRequest, request: Request) -> Response:
        config.selection_of(body.model)  # an unknown one is refused before anything is read
        record: Record = request.scope["state"]["record"]
        text = await run_in_threadpool(chats.text, body)  # a long text would keep all others waiting
        prompt = await run_in_threadpool(tokens_of, text)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        obeys = await run_in_threadpool(obeyed, body)
        asked = answers.ask(body, record, [prompt], max_tokens, CHAT_TOKENS, logprobs, **obeys)
        said = [ChatAnswer(record.id, a.id, body.model, chats.answer(body, text), texts, body.logprobs) for a in asked]
        return await answers.respond(request, body, asked, said, record)

    @keyed.post("/v1/completions", response_model=document.Completion, responses=document.ASKED | document.STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        config.selection_of(body.model)  # an unknown one is refused before anything is read
        record: Record = request.scope["state"]["record"]
        prompts = await run_in_threadpool(lambda: [completion_prompt(prompt) for prompt in body.prompts])
        asked = answers.ask(body, record, prompts, body.max_tokens, COMPLETION_TOKENS, body.logprobs)
        said = [CompletionAnswer(record.id, body.model, texts, body.logprobs is not None) for _ in asked]
        return await answers.respond(request, body, asked, said, record)

    for routes in (keyed, page.router(), uploads.router()):
        app.include_router(routes)
    return app
