"""Runs the application: the socket, signals, and a shutdown that cuts no answer off."""

import logging
import resource
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from tokensieve.config import UserError
from tokensieve.engine import Engine, Service
from tokensieve.serve.app import create_app
from tokensieve.serve.settings import ServeConfig

SLOWEST_CLIENT = 30  # seconds that clients have to read the end of their answers when the server stops


class Server(uvicorn.Server):
    """A server that drains at the first signal and stops at the second.

    From the first signal on, new requests are refused and /health answers 503, until the last request has ended.
    """

    def __init__(self, config: uvicorn.Config, service: Service, on_start: Callable[[], None] = lambda: None):
        super().__init__(config)
        self._service, self._on_start = service, on_start
        self._signalled = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled:
            self.should_exit = self.force_exit = True
        self._signalled = self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self._signalled and (self._service.open == 0 or not self._service.alive):
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A socket whose connections send each part of an answer at once.

    Port 0 takes any free one. UserError if the address cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen at {host} port {port} ({reason}); choose another with --port or --host"
        ) from error
    # Head and body are written apart. Without this option the body waits for the client's acknowledgement of the head,
    # 40 ms on a connection that is used again. asyncio sets it only on sockets that were made for IPPROTO_TCP by name;
    # connections inherit it from here.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make(service: Service, tokenizer: Any, config: ServeConfig, on_start: Callable[[], None] = lambda: None) -> Server:
    settings = uvicorn.Config(
        create_app(service, tokenizer, config),
        lifespan="on",
        log_config=None,
        access_log=False,  # the gate logs requests
        timeout_graceful_shutdown=SLOWEST_CLIENT,
        ws="none",
    )
    return Server(settings, service, on_start)


def run(
    engine: Engine,
    listening: socket.socket,
    config: ServeConfig,
    on_start: Callable[[str], None],
) -> None:
    """Serve until a signal ends it. KeyboardInterrupt if a second signal did."""
    log_lines_alone()
    allow_connections()
    service = Service(engine)
    server = make(service, engine.tokenizer, config, lambda: on_start(address(listening)))
    server.run(sockets=[listening])
    if server.force_exit:
        service.stop(drain=False)  # an exit while the engine's thread is in a step would abort the process
        raise KeyboardInterrupt


def allow_connections() -> None:
    """Raise the limit of open files to the system's: a connection is one, and a process may first have 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def log_lines_alone() -> None:
    """Write the requests' lines unchanged: they are JSON for programs, and must not be wrapped to fit a terminal."""
    log = logging.getLogger("tokensieve.serve")
    log.handlers, log.propagate = [logging.StreamHandler(sys.stderr)], False
    log.setLevel(logging.INFO)
