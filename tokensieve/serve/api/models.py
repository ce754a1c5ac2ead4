"""`GET /v1/models`: the served model, and beside a sparse one the same model with dense attention."""

from typing import Any

from fastapi import APIRouter, Request

from tokensieve.serve import openapi
from tokensieve.serve.state import ServerState, state_of

router = APIRouter()


@router.get("/v1/models", response_model=openapi.ModelCards, responses=openapi.errors())
async def models(request: Request) -> dict[str, Any]:
    state = state_of(request)
    return {"object": "list", "data": [_card(state, name) for name in state.config.models]}


@router.get("/v1/models/{model:path}", response_model=openapi.ModelCard, responses=openapi.errors(404))
async def model(model: str, request: Request) -> dict[str, Any]:
    return _card(state_of(request), model)


def _card(state: ServerState, model: str) -> dict[str, Any]:
    selector, engine = state.config.selector_of(model), state.service.engine  # UnknownModel if it is not served
    return {
        "id": model,
        "object": "model",
        "created": state.started,
        "owned_by": "tokensieve",
        "max_model_len": state.longest,
        "index_topk": engine.top_k if selector == "indexer" else None,
    }
