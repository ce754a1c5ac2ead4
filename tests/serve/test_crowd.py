"""A thousand clients at once, on a cache with room for a few; some leave, and some read slowly."""

import asyncio
import gc
import json
import logging
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import psutil
import pytest

from tests.support import servers
from tokensieve.engine import EngineConfig, Service

ENGINE = EngineConfig(pages=20, running=24, chunk=64)  # room for four of the longest


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Service]]:
    with servers.running(servers.tiny(), ENGINE, mirror=0.1) as both:
        yield both


def bodies(count: int) -> list[dict[str, Any]]:
    """Requests of all lengths. Half of them begin alike, and half of them are streams."""
    draw = random.Random(5)
    start = [draw.randrange(16, 4096) for _ in range(128)]
    return [
        {
            "model": draw.choice(["sparse", "sparse:dense"]),
            "prompt": (start if i % 2 else []) + [draw.randrange(16, 4096) for _ in range(draw.randint(1, 100))],
            "max_tokens": 90 if i % 20 == 0 else draw.randint(1, 4),
            "temperature": draw.choice([0, 1]),
            "seed": i,
            "stream": i % 4 < 2,
        }
        for i in range(count)
    ]


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """The answer's text. Anything else fails the test."""
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    if not body["stream"]:
        return answer.json()["choices"][0]["text"]
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


async def at_once(at: str, asked: list[dict[str, Any]], together: int) -> list[str]:
    """The texts of all answers, from `together` clients at once, each with a connection of its own."""
    limits = httpx.Limits(max_connections=together)
    async with httpx.AsyncClient(base_url=at, timeout=120, limits=limits, trust_env=False) as client:
        return await asyncio.gather(*(ask(client, body) for body in asked))


def tasks() -> int:
    return sum(type(o) is asyncio.Task and not o.done() for o in gc.get_objects())


@pytest.mark.parametrize("clients", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_crowd(served, clients: int) -> None:
    """All requests get the answers that they get alone, with the service's default limit of the queue."""
    at, service = served
    asked = bodies(clients // 5)
    alone = asyncio.run(at_once(at, asked, 1))
    servers.settled(service)
    before = tasks()
    random.Random(1).shuffle(many := [*range(len(asked))] * 5)
    begin = time.monotonic()
    found = asyncio.run(at_once(at, [asked[i] for i in many], clients))
    print(f"{clients} in {time.monotonic() - begin:.1f} s, {service.load}")
    assert found == [alone[i] for i in many]
    servers.settled(service, 60)  # those that are mirrored, too
    assert service.load.preempted > 0
    end = time.monotonic() + 10
    while tasks() > before:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_mirror_leaves_the_engine_to_those_who_wait(caplog: pytest.LogCaptureFixture) -> None:
    engine = EngineConfig(pages=20, running=1)
    with (
        caplog.at_level(logging.INFO, "tokensieve.serve"),
        servers.running(servers.tiny(), engine, mirror=1) as (at, _),
    ):
        asyncio.run(at_once(at, bodies(7)[1:], 6))
        end = time.monotonic() + 10
        while caplog.text.count('"mirror"') < 6:
            assert time.monotonic() < end
            time.sleep(0.02)
    told = [json.loads(r.getMessage()) for r in caplog.records if '"mirror"' in r.getMessage()]
    skipped = [one.get("skipped") for one in told]
    assert skipped.count("requests wait") >= 3 and skipped[-1] is None


def sent(at: str, body: dict[str, Any], room: int = 0) -> socket.socket:
    """A connection that has sent this request. room: bytes of its receive buffer; 0: the system's default."""
    host, port = at.removeprefix("http://").split(":")
    connection = socket.socket()
    if room:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    connection.connect((host, int(port)))
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def test_a_crowd_that_leaves(served) -> None:
    """Clients leave while they wait, during prompts and during answers. Pages are freed, and later requests run."""
    at, service = served
    question = bodies(1)[0]
    alone = asyncio.run(at_once(at, [question], 1))
    servers.settled(service)
    draw, before, files = random.Random(3), tasks(), psutil.Process().num_fds()
    for _ in range(2):
        crowd = [sent(at, body | {"max_tokens": 200}) for body in bodies(40)]
        draw.shuffle(crowd)
        while crowd:
            time.sleep(draw.random() * 0.05)
            crowd.pop().close()
    servers.settled(service)
    told = httpx.get(at + "/metrics").text
    for status in (200, 499):  # in the middle of a stream, and before it
        assert f'finish="abort",route="/v1/completions",status="{status}"' in told
    assert asyncio.run(at_once(at, [question], 1)) == alone
    end = time.monotonic() + 10  # connections that were kept open are closed after five seconds
    while psutil.Process().num_fds() > files or tasks() > before:
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_slow_reader_delays_nobody(served) -> None:
    """A client reads a byte now and then of an answer that is too large for all buffers.

    The answers of others come at once, and at the end the rest of its own.
    """
    at, service = served
    asked = {"model": "sparse", "prompt": [5], "n": 4, "max_tokens": 200, "logprobs": 20, "seed": 1, "stream": True}
    before, memory = tasks(), psutil.Process().memory_info().rss
    with sent(at, asked, room=4096) as slow:
        read = slow.recv(1)
        others, longest = bodies(20)[1:5], 0.0
        while service.open:  # until the engine is done with it
            begin = time.monotonic()
            asyncio.run(at_once(at, others, 4))
            longest = max(longest, time.monotonic() - begin)
            read += slow.recv(1)
        grown = psutil.Process().memory_info().rss - memory
        assert longest < 5 and tasks() > before, "the server has to be waiting for its reader"
        while not read.endswith(b"0\r\n\r\n"):
            read += slow.recv(2**20)
    events = [line for line in read.decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-1]]
    assert sum(len(choice["logprobs"]["tokens"]) for choice in choices) == 4 * 200
    print(f"others within {longest:.1f} s, {grown / 2**20:.1f} MiB")
    assert grown < 16 * 2**20  # 800 tokens with 20 log probabilities each: 3 MiB until they are read
