"""What the routes of one application share."""

from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request

from tokensieve.engine import Service
from tokensieve.serve.body import Bodies
from tokensieve.serve.chat_format import ChatFormat
from tokensieve.serve.completion_format import CompletionFormat
from tokensieve.serve.handler import Handler
from tokensieve.serve.metrics import Metrics
from tokensieve.serve.settings import ServeConfig


@dataclass(frozen=True)
class ServerState:
    """started: seconds since 1970, when the application was made."""

    service: Service
    tokenizer: Any
    config: ServeConfig
    metrics: Metrics
    bodies: Bodies
    handler: Handler
    chat: ChatFormat
    completion: CompletionFormat
    started: int

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and answer together."""
        return self.service.engine.longest


def attach(app: FastAPI, state: ServerState) -> None:
    app.state.server = state


def state_of(request: Request) -> ServerState:
    return request.app.state.server
