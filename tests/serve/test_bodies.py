"""The bodies of requests: packed, unreadable, slow, and such as would stop the event loop."""

import gzip
import json
import select
import socket
import time
from collections.abc import Iterator

import httpx2 as httpx
import pytest

from tests.support import servers
from tokensieve.engine import EngineConfig, Service
from tokensieve.serve.errors import UNREADABLE
from tokensieve.serve.json_size import MOST, is_bounded
from tokensieve.serve.settings import TimeLimits

ROUTE = "/v1/completions"
ASKED = {"model": "sparse", "prompt": "a", "max_tokens": 1}
JSON = {"Content-Type": "application/json"}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Service]]:
    seconds = TimeLimits(head=0.5, body=0.3, body_rate=10_000)
    with servers.running(servers.tiny(), EngineConfig(pages=16, running=2), seconds=seconds, max_body=2**24) as both:
        yield both


@pytest.fixture(scope="module")
def at(served: tuple[str, Service]) -> str:
    return served[0]


def connected(at: str) -> socket.socket:
    host, port = at.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def rest(connection: socket.socket) -> bytes:
    """What arrives until the server closes the connection."""
    read = b""
    while part := connection.recv(2**16):
        read += part
    return read


def error(at: str, body: bytes, headers: dict[str, str], status: int = 400, route: str = ROUTE) -> str:
    answer = httpx.post(at + route, content=body, headers=JSON | headers)
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


def test_gzip(at: str) -> None:
    packed = gzip.compress(json.dumps(ASKED).encode())
    for body in (packed, gzip.compress(b" ") + packed):  # of one member, and of two
        answer = httpx.post(at + ROUTE, content=body, headers=JSON | {"Content-Encoding": "gzip"})
        assert answer.json()["usage"]["completion_tokens"] == 1
    for damaged in (packed[:-9], b"{}", packed[:30] + b"\0" * 30):
        assert "not gzip" in error(at, damaged, {"Content-Encoding": "gzip"})
    bomb = gzip.compress(bytes(2**24 + 1))
    assert "more than" in error(at, bomb, {"Content-Encoding": "gzip"}, 413)
    assert "'br'; send it as gzip" in error(at, packed, {"Content-Encoding": "br"}, 415)


UNREADABLE_BODIES = {
    b'{"model": "\xff"}': UNREADABLE[UnicodeDecodeError],
    b"[" * 9000: UNREADABLE[RecursionError],
    b'{"seed": ' + b"9" * 5000 + b"}": UNREADABLE[ValueError],
    b'{"model": ': "the body is no JSON",
}


@pytest.mark.parametrize("body", UNREADABLE_BODIES, ids=["bytes", "depth", "digits", "cut"])
def test_the_reason_why_a_body_is_unreadable(at: str, body: bytes) -> None:
    assert UNREADABLE_BODIES[body] in error(at, body, {})


def test_the_fault_of_the_alternative_that_was_meant(at: str) -> None:
    def told(route: str, **fields: object) -> str:
        return error(at, json.dumps({"model": "sparse"} | fields).encode(), {}, route=route)

    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}
    found = told("/v1/chat/completions", messages=[image])
    assert found.startswith("messages.0.content.0.type: Input should be 'text'; images")
    assert told("/v1/chat/completions", messages=[{"role": "user", "content": [{"type": "text"}]}]) == (
        "messages.0.content.0.text: Field required"
    )
    assert told(ROUTE, prompt="a", stop=["a", 5]) == "stop.1: Input should be a valid string"
    assert "prompt: Input should be a valid string" in told(ROUTE, prompt=7)
    assert told(ROUTE, prompt=None) == "prompt: Field required"  # null counts as missing
    nameless = {"type": "function", "function": {"name": None}}
    assert told("/v1/chat/completions", messages=[{"role": None, "content": ""}], tools=[nameless]) == (
        "messages.0.role: Field required; tools.0.function.name: Field required"
    )
    for body in (b"", b"null", b"[]", b"5"):
        assert error(at, body, {}) == "the body is no JSON object; send one"


def test_a_client_that_leaves_within_its_body_is_counted_as_gone(at: str) -> None:
    def gone() -> float:
        line = 'tokensieve_requests_total{finish="",route="other",status="499"} '
        page = httpx.get(at + "/metrics").text
        return float(page.partition(line)[2].partition("\n")[0] or 0)

    before = gone()
    with connected(at) as connection:
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
    end = time.monotonic() + 5
    while gone() == before:
        assert time.monotonic() < end
    assert gone() == before + 1


def test_a_body_has_its_time(at: str) -> None:
    for sent in (b"{", b" " * 60_000):  # the second one earns six seconds, but must go on
        begin = time.monotonic()
        with connected(at) as stalled:
            stalled.sendall(HEAD + b"Content-Length: 100000\r\n\r\n" + sent)
            assert b"408 Request Timeout" in (read := rest(stalled)) and b"did not arrive in time" in read
        assert time.monotonic() - begin < 4
    with connected(at) as dripping:
        dripping.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
        drops = 0
        while not select.select([dripping], [], [], 0.05)[0]:
            dripping.sendall(b" ")
            drops += 1
        assert drops < 60 and b"408 Request Timeout" in rest(dripping)
    with connected(at) as steady:  # longer than the limit, and faster than the least rate
        body = json.dumps(ASKED).encode() + b" " * 40_000
        steady.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
        begin = time.monotonic()
        for i in range(0, len(body), 4000):
            steady.sendall(body[i : i + 4000])
            assert i + 4000 >= len(body) or not select.select([steady], [], [], 0.05)[0], "an early answer"
        assert time.monotonic() - begin > 0.3 and b"200 OK" in rest(steady)


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /h"])
def test_a_head_has_its_time(at: str, sent: bytes) -> None:
    begin = time.monotonic()
    with connected(at) as connection:
        connection.sendall(sent)
        read = rest(connection)
    assert time.monotonic() - begin >= 0.5 and read.count(b"200 OK") == sent.count(b"\n\r\n")


def test_a_connection_that_is_used_stays(at: str) -> None:
    with httpx.Client(base_url=at, trust_env=False) as client:
        ports, end = set(), time.monotonic() + 0.9
        while time.monotonic() < end:
            stream = client.get("/health").extensions["network_stream"]
            ports.add(stream.get_extra_info("client_addr"))
    assert len(ports) == 1


LARGE = {
    "messages": b'{"messages": [' + b",".join([b'{"role":"user"}'] * 800_000) + b"]}",
    "lists": b"[" + b",".join([b"[]"] * 4_000_000) + b"]",
    "ids": b"[" + b",".join([b"5"] * 7_000_000) + b"]",
    "short lists": b"[" + b",".join([b"[]"] * 340_000) + b"]",
    "fields": b"{" + b",".join(b'"%d":1' % i for i in range(800_000)) + b"}",
    "between strings": b"[" + b",".join([b'"\\"[",[]'] * 800_000) + b"]",
}


@pytest.mark.parametrize("name", LARGE)
def test_many_values_do_not_stop_the_loop(at: str, name: str) -> None:
    assert "too many fields and values" in error(at, LARGE[name], {}, 413)


def test_a_long_text_is_not_many_values() -> None:
    for text in ('{"a": [1, 2]}, "' * 400_000, "\\" * 5_000_000, "[" * 5_000_000):
        assert is_bounded(json.dumps({"prompt": text, "stop": ["]", text[:7]]}).encode())
    assert is_bounded(b"[" + b"5," * (MOST[b","] - 1) + b"5]")
    assert not is_bounded(b'["' + b"[" * 2**20 + b'"' + b",5" * (MOST[b","] + 1) + b"]")


def test_lists_are_bounded(at: str) -> None:
    message = {"role": "user", "content": "a"}
    for fields in ({"messages": [message] * 17_000}, {"messages": [message], "tools": [{}] * 1100}):
        told = error(at, json.dumps({"model": "sparse"} | fields).encode(), {}, route="/v1/chat/completions")
        assert "tools" in told or "at most 16384 items" in told
    told = error(at, json.dumps({"model": "sparse", "prompt": ["a"] * 129}).encode(), {})
    assert told == "prompt: List should have at most 128 items after validation, not 129"


def test_the_end_leaves_a_client_that_does_not_read(caplog: pytest.LogCaptureFixture) -> None:
    config, seconds = EngineConfig(pages=40, running=4), TimeLimits(answer=0.2)
    asked = ASKED | {"n": 4, "max_tokens": 200, "ignore_eos": True, "logprobs": 20, "stream": True}
    body = json.dumps(asked).encode()
    with socket.socket() as slow, servers.running(servers.tiny(), config, seconds=seconds) as (at, service):
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = at.removeprefix("http://").split(":")
        slow.connect((host, int(port)))
        slow.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert b"200 OK" in slow.recv(100)
        servers.settled(service, 60)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5 and "Traceback" not in caplog.text and "ERROR" not in caplog.text


def test_the_end_waits_for_no_body() -> None:
    config = EngineConfig(pages=8, running=1)
    with socket.socket() as begun, servers.running(servers.tiny(), config) as (at, service):
        host, port = at.removeprefix("http://").split(":")
        begun.connect((host, int(port)))
        begun.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert httpx.get(at + "/health").is_success
        service.draining = True
        with connected(at) as new:
            new.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
            assert b"503 Service Unavailable" in new.recv(2**16)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5
