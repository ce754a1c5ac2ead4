"""The application: the state, the gate, the error handlers and the routers, put together."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware

from tokensieve.engine import Service
from tokensieve.serve import errors, playground
from tokensieve.serve.api import chat, completions, models, monitoring
from tokensieve.serve.body import Bodies
from tokensieve.serve.chat_format import ChatFormat
from tokensieve.serve.completion_format import CompletionFormat
from tokensieve.serve.gate import Gate
from tokensieve.serve.handler import Handler
from tokensieve.serve.metrics import Metrics
from tokensieve.serve.playground.mirror import Mirror
from tokensieve.serve.prompts import Prompts
from tokensieve.serve.settings import ServeConfig
from tokensieve.serve.state import ServerState, attach
from tokensieve.serve.token_texts import TokenTexts


def create_app(service: Service, tokenizer: Any, config: ServeConfig) -> FastAPI:
    """The application. Its lifespan starts the service, and stops it after the last request."""
    # FastAPI's own pages of documentation would load scripts from elsewhere
    app = FastAPI(title="tokensieve", lifespan=_lifespan, docs_url=None, redoc_url=None)
    state = _state(service, tokenizer, config)
    attach(app, state)
    app.add_middleware(Gate, config=config, metrics=state.metrics, bodies=state.bodies)
    if config.allow_origins:  # before the gate: a browser asks for permission without a key, and reads refusals too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allow_origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=("Retry-After", "X-Request-Id"),
        )
    errors.install(app)
    # Only for /openapi.json: the gate has checked the key before any route is reached.
    key = [Depends(HTTPBearer(auto_error=False))] if config.keys else []
    app.include_router(monitoring.public)
    for router in (monitoring.router, models.router, chat.router, completions.router):
        app.include_router(router, dependencies=key)
    if config.playground:
        app.include_router(playground.router(), dependencies=key)
    return app


def _state(service: Service, tokenizer: Any, config: ServeConfig) -> ServerState:
    metrics = Metrics(service)
    prompts, texts = Prompts(tokenizer, service.engine.longest), TokenTexts(tokenizer)
    return ServerState(
        service=service,
        tokenizer=tokenizer,
        config=config,
        metrics=metrics,
        bodies=Bodies(config, service),
        handler=Handler(
            service, config, metrics, on_complete=Mirror(service, config.mirror, config.selection).consider
        ),
        chat=ChatFormat(tokenizer, prompts, texts),
        completion=CompletionFormat(prompts, texts),
        started=int(time.time()),
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.server.service
    service.start()
    yield
    await anyio.to_thread.run_sync(service.stop)
