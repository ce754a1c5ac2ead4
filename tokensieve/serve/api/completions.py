"""`POST /v1/completions`: texts or token ids to be continued."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from tokensieve.serve import openapi
from tokensieve.serve.schema import CompletionRequest
from tokensieve.serve.state import state_of

router = APIRouter()


@router.post("/v1/completions", response_model=openapi.Completion, responses=openapi.ENGINE | openapi.STREAM)
async def completions(body: CompletionRequest, request: Request) -> Response:
    state = state_of(request)
    return await state.handler.respond(request, body, state.completion)
