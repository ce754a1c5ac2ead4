"""`POST /v1/chat/completions`: messages, by the model's chat template."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from tokensieve.serve import openapi
from tokensieve.serve.schema import ChatRequest
from tokensieve.serve.state import state_of

router = APIRouter()


@router.post("/v1/chat/completions", response_model=openapi.Chat, responses=openapi.ENGINE | openapi.STREAM)
async def chat(body: ChatRequest, request: Request) -> Response:
    state = state_of(request)
    return await state.handler.respond(request, body, state.chat)
