"""The time that a request takes over a connection that is used again."""

import socket
import time
from collections.abc import Iterator

import httpx2 as httpx
import pytest

from tests.support import servers
from tokensieve.config import UserError
from tokensieve.engine import EngineConfig
from tokensieve.serve import server

BOUND = 0.020  # seconds: a request takes about 1 ms, and a delayed acknowledgement of Linux adds 40 ms at the least


@pytest.fixture(scope="module")
def at() -> Iterator[str]:
    with servers.running(servers.tiny(), EngineConfig(pages=16, running=1)) as (at, _):
        yield at


def test_a_connection_that_is_used_again_waits_for_nothing(at: str) -> None:
    """Head and body of an answer are written apart; with Nagle's algorithm the body would wait for the client's acknowledgement."""
    taken = []  # of which the least counts: on a busy machine each may take long, and none but the first would be spared the delay
    with httpx.Client(base_url=at, trust_env=False) as client:
        for _ in range(15):
            begin = time.perf_counter()
            assert client.get("/health").status_code == 200
            taken.append(time.perf_counter() - begin)
    assert min(taken[1:]) < BOUND


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_every_connection_sends_at_once(host: str) -> None:
    try:
        listening = server.listen(host, 0)
    except UserError as error:
        pytest.skip(str(error))  # a machine may be without IPv6
    with listening, socket.create_connection(listening.getsockname()[:2]), listening.accept()[0] as accepted:
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
