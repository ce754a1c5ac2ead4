"""Runs the application: the socket, signals, and a shutdown that cuts no answer off."""

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import HANDLED_SIGNALS

from tokensieve.config import UserError
from tokensieve.engine import Engine, Service
from tokensieve.serve.app import create_app
from tokensieve.serve.body import Bodies
from tokensieve.serve.settings import ServeConfig, TimeLimits


class Server(uvicorn.Server):
    """A server that drains at the first signal, and ends the process at the second.

    From the first signal on, new requests are refused and /health answers 503, until the last request has ended.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        bodies: Bodies,
        seconds: TimeLimits,
        on_start: Callable[[], None] = lambda: None,
    ):
        super().__init__(config)
        self._service, self._bodies, self._seconds, self._on_start = service, bodies, seconds, on_start
        self._signalled = False
        # Since when a connection is between two requests. Each request is another cycle; the first comes after None.
        self._between: dict[tuple[H11Protocol, RequestResponseCycle], float] = {}

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled:
            # Not by an exception: the engine's thread may be in a step, and would abort the process. And not by
            # print: the signal may have come in the middle of one.
            name, open_requests = signal.Signals(sig).name, self._service.open
            os.write(
                2, f"tokensieve: ended by a second signal ({name}); {open_requests} answers are cut off\n".encode()
            )
            os._exit(128 + sig)
        self._signalled = self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        self._close_silent()
        if self._signalled:
            self._bodies.stop_waiting()
            self.should_exit = self._service.open == 0 or not self._service.alive
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._bodies.stop_waiting()
        # A client that does not read its answer is disconnected, which ends its request in order. At a limit of
        # uvicorn's own, the request's task would be cancelled, and its traceback logged.
        leave = asyncio.get_running_loop().call_later(self._seconds.answer, self._abort_connections)
        await super().shutdown(sockets)
        leave.cancel()

    def _close_silent(self) -> None:
        """Close connections whose next request's head has not come in time. uvicorn waits for it without a limit."""
        connections, now = cast("set[H11Protocol]", self.server_state.connections), time.monotonic()
        between = [(c, c.cycle) for c in connections if c.cycle is None or c.cycle.response_complete]
        self._between = {key: self._between.get(key, now) for key in between}
        for (connection, _), since in self._between.items():
            if now - since > self._seconds.head:
                connection.shutdown()

    def _abort_connections(self) -> None:
        for connection in self.server_state.connections:
            connection.transport.abort()


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
    app = create_app(service, tokenizer, config)
    settings = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,  # the gate logs requests
        http="h11",
        timeout_keep_alive=config.seconds.idle,
        ws="none",
    )
    return Server(settings, service, app.state.server.bodies, config.seconds, on_start)


def run(
    engine: Engine,
    listening: socket.socket,
    config: ServeConfig,
    on_start: Callable[[str], None],
) -> None:
    """Serve until a signal ends it. A second signal ends the process, with status 128 and the signal's number."""
    log_lines_alone()
    allow_connections()
    server = make(Service(engine), engine.tokenizer, config, lambda: on_start(address(listening)))
    server.run(sockets=[listening])
    for number in HANDLED_SIGNALS:  # nothing is left to end, and Python takes half a second to exit
        signal.signal(number, signal.SIG_IGN)


def allow_connections() -> None:
    """Raise the limit of open files to the system's: a connection is one, and a process may first have 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def log_lines_alone() -> None:
    """Write the requests' lines unchanged: they are JSON for programs, and must not be wrapped to fit a terminal."""
    log = logging.getLogger("tokensieve.serve")
    log.handlers, log.propagate = [logging.StreamHandler(sys.stderr)], False
    log.setLevel(logging.INFO)
