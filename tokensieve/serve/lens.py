"""`POST /lens`: what the model looked at when it chose a token, for the page. The context is run once more, mostly out of the cache."""

from collections.abc import Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import Field

import tokensieve.engine as engine
from tokensieve.engine import Output, Sampling, Service
from tokensieve.engine.text import Pieces
from tokensieve.engine.trace import LayerTrace
from tokensieve.serve import document
from tokensieve.serve.errors import ApiError
from tokensieve.serve.gate import Record
from tokensieve.serve.schema import Ids, Strict
from tokensieve.serve.settings import ServeConfig
from tokensieve.serve.streaming import unless_gone


class LensRequest(Strict):
    """token_ids: prompt and answer, up to the token before the one that is asked about: the last one's attention chose it."""

    model: str
    token_ids: Annotated[Ids, Field(min_length=1)]


def text_of(tokenizer: Any, ids: list[int]) -> tuple[str, list[int]]:
    """The text of tokens, markers too, and the place in it, in characters, where each begins."""
    pieces, text, length, starts = Pieces(tokenizer, skip_special=False), [], 0, []
    for id in ids:
        starts.append(length)
        text.append(pieces.push(id))
        length += len(text[-1])
    return "".join(text), starts


def answer(tokenizer: Any, body: LensRequest, looks: Sequence[LayerTrace]) -> JSONResponse:
    """A million numbers at a long context: not for the thread in which everybody's answers are sent."""
    text, starts = text_of(tokenizer, body.token_ids)
    layers = [{"read": len(look.selected), **vars(look)} for look in looks]
    return JSONResponse({"model": body.model, "text": text, "starts": starts, "context": len(starts), "layers": layers})


def router(service: Service, tokenizer: Any, config: ServeConfig) -> APIRouter:
    routes = APIRouter()

    @routes.post("/lens", response_model=document.Lens, responses=document.ASKED)
    async def lens(body: LensRequest, request: Request) -> JSONResponse:
        """What each layer's attention read, and what it would have read without a selection."""
        selection = config.selection_of(body.model)
        record: Record = request.scope["state"]["record"]
        record.model, record.prompt_tokens = body.model, len(body.token_ids)
        sampling = Sampling(max_tokens=1, ignore_eos=True)
        asked = engine.Request(record.id, tuple(body.token_ids), sampling, selection, trace=True)
        first = await unless_gone(request.receive, _first(service, asked))
        if first.finish == "error":
            raise ApiError(500, f"{first.error}; the request may be sent again", code="engine_error")
        record.cached_tokens = first.cached_tokens
        return await run_in_threadpool(answer, tokenizer, body, first.trace)

    return routes


async def _first(service: Service, asked: engine.Request) -> Output:
    async with aclosing(service.stream(asked)) as stream:
        return await anext(stream)
