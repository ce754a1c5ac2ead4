"""`POST /lens`: what the model attended to when it chose a token, for the page's lens.

The context is run once more; most of it is usually in the cache.
"""

from collections.abc import Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import Field

import tokensieve.engine as engine
from tokensieve.engine import Output, Sampling, Service
from tokensieve.engine.detokenizer import Pieces
from tokensieve.engine.trace import LayerTrace
from tokensieve.serve import openapi
from tokensieve.serve.engine_requests import engine_request
from tokensieve.serve.errors import ApiError
from tokensieve.serve.fields import Strict
from tokensieve.serve.record import record_of
from tokensieve.serve.schema import Ids
from tokensieve.serve.state import state_of
from tokensieve.serve.streaming import unless_gone

router = APIRouter()


class LensRequest(Strict):
    """token_ids: prompt and answer, up to the token before the one in question. The last token chose that one."""

    model: str
    token_ids: Annotated[Ids, Field(min_length=1)]


@router.post("/lens", response_model=openapi.Lens, responses=openapi.ENGINE)
async def lens(body: LensRequest, request: Request) -> JSONResponse:
    """What each layer's attention read, and what it would have read without a selection."""
    state = state_of(request)
    selector = state.config.selector_of(body.model)
    record = record_of(request)
    record.model, record.prompt_tokens = body.model, len(body.token_ids)
    sampling = Sampling(max_tokens=1, ignore_eos=True)
    traced = engine_request(record.id, tuple(body.token_ids), sampling, selector, trace=True)
    output = await unless_gone(request.receive, _first_output(state.service, traced))
    if output.finish == "error":
        raise ApiError(500, output.error, code="engine_error")
    record.cached_tokens = output.cached_tokens
    # a million numbers at a long context: too much work for the event loop, which sends all other answers
    return await run_in_threadpool(_response, state.tokenizer, body, output.trace)


async def _first_output(service: Service, request: engine.Request) -> Output:
    async with aclosing(service.stream(request)) as stream:
        return await anext(stream)


def _response(tokenizer: Any, body: LensRequest, traces: Sequence[LayerTrace]) -> JSONResponse:
    text, starts = text_of(tokenizer, body.token_ids)
    layers = [{"read": len(layer.selected), **vars(layer)} for layer in traces]
    told = {"model": body.model, "text": text, "starts": starts, "context": len(starts)}
    return JSONResponse(told | {"markers": markers_of(tokenizer, body.token_ids), "layers": layers})


def markers_of(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Positions of the tokens that the tokenizer holds apart from text: markers of a chat template, the begin, ..."""
    apart = {id for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}  # some are spaces
    return [position for position, id in enumerate(ids) if id in apart]


def text_of(tokenizer: Any, ids: list[int]) -> tuple[str, list[int]]:
    """The text of tokens, with markers, and the index of each token's first character in it."""
    pieces, text, length, starts = Pieces(tokenizer, skip_special=False), [], 0, []
    for id in ids:
        starts.append(length)
        text.append(pieces.push(id))
        length += len(text[-1])
    return "".join(text), starts
