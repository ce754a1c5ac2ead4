"""The time that a request takes over a connection that is used again."""

import socket
import time
from collections.abc import Iterator

import httpx2 as httpx
import pytest

from tests.support import servers
from tokensieve.engine import EngineConfig
from tokensieve.serve import server

BOUND = 0.020  # seconds: a request takes about 1 ms, and a delayed acknowledgement of Linux adds 40 ms at the least


@pytest.fixture(scope="module")
def at() -> Iterator[str]:
    with servers.running(servers.tiny(), EngineConfig(pages=16, running=1)) as (at, _):
        yield at


def test_a_connection_that_is_used_again_waits_for_nothing(at: str) -> None:
    """Head and body of an answer are written apart; with Nagle's algorithm the body would wait for the client's
    acknowledgement.
    """
    taken = []  # of which the least counts: on a busy machine each may take long
    with httpx.Client(base_url=at, trust_env=False) as client:
        for _ in range(15):
            begin = time.perf_counter()
            assert client.get("/health").status_code == 200
            taken.append(time.perf_counter() - begin)
    assert min(taken[1:]) < BOUND


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_every_connection_sends_at_once(host: str) -> None:
    if host == "::1":
        _needs_ipv6()
    listening = server.listen(host, 0)
    with listening, socket.create_connection(listening.getsockname()[:2]), listening.accept()[0] as accepted:
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def _needs_ipv6() -> None:
    """Skips where the machine has no IPv6: a plain socket finds out, so a fault of the server's own shows as one."""
    try:
        with socket.socket(socket.AF_INET6) as plain:
            plain.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
