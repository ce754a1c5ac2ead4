"""A server in a thread, on its own socket; and a model so small that a thousand requests take seconds."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tokensieve
from tests.support import models
from tokensieve.engine import Engine, EngineConfig, Service
from tokensieve.model import DecoderForCausalLM
from tokensieve.serve import server
from tokensieve.serve.settings import ServeConfig

LIMITS = {"max_tokens": 200, "max_prompt_tokens": 600, "max_body": 20_000}


def tiny(tokenizer: Any = None) -> tuple[DecoderForCausalLM, Any]:
    """Random weights, the bundled tokenizer by default, and k = 24, so that keys are really left out."""
    tokenizer = tokenizer or tokensieve.load_tokenizer("sparse")
    shape = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "first_k_dense_replace": 1, "hidden_size": 32}
    return models.ours(models.config("v32", **shape)), tokenizer


@contextmanager
def running(
    loaded: tuple[DecoderForCausalLM, Any], engine: EngineConfig, waiting: int | None = None, **settings: Any
) -> Iterator[tuple[str, Service]]:
    """The server's address, and its service. At the end no page of the cache may be in use."""
    model, tokenizer = loaded
    made = Engine(model, tokenizer, engine)
    service = Service(made) if waiting is None else Service(made, waiting)
    with server.listen("127.0.0.1", 0) as listening:
        listening.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16
        )  # small, so that a slow reader soon blocks the server
        made = server.make(service, tokenizer, ServeConfig("sparse", **(LIMITS | settings)))
        thread = threading.Thread(target=made.run, kwargs={"sockets": [listening]})
        thread.start()
        while not made.started:
            time.sleep(0.01)
        try:
            yield server.address(listening), service
        finally:
            made.should_exit = True
            thread.join()
    assert not service.alive and service.engine.scheduler.pool.used == 0


def settled(service: Service, seconds: float = 10) -> None:
    """Wait until no request is open and all pages are free."""
    end = time.monotonic() + seconds
    while service.open or service.engine.busy:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert service.engine.scheduler.pool.used == 0
