"""Endpoints that are down, slow, rate-limited or answer nonsense: one line each; what is finished stays."""

import gzip
import json
import math
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import tokensieve.evals.endpoint as endpoint
from tests.support.endpoints import Answer, answering
from tokensieve.config import UserError
from tokensieve.evals import Endpoint
from tokensieve.evals.endpoint import Refused

CARDS = {"data": [{"id": "m", "max_model_len": 4096}]}


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """How long was waited, which takes no time."""
    waited: list[float] = []
    monkeypatch.setattr(endpoint.time, "sleep", waited.append)
    return waited


def test_nobody_is_there(pauses) -> None:
    with pytest.raises(UserError, match="cannot be reached .*is the server up"):
        Endpoint("http://127.0.0.1:9/v1", retries=2).models()
    assert pauses == [1, 2]


@pytest.mark.parametrize("url", ["http://[::1", "http://a:b/v1", "127.0.0.1:8000/v1", "http:///v1", ""])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UserError, match="is no address of a server; give one such as http://127.0.0.1:8000/v1"):
        Endpoint(url)


def test_an_endpoint_that_is_slow() -> None:
    def answer(*_: Any) -> tuple[int, Any]:
        time.sleep(0.6)
        return 200, CARDS

    with answering(answer) as url, pytest.raises(UserError, match="did not answer within 0.1 seconds.*--resume"):
        Endpoint(url, seconds=0.1).models()


def test_a_rate_limit_is_waited_for_and_not_forever(pauses) -> None:
    asked = []

    def answer(path: str, _: Any) -> tuple[int, Any]:
        asked.append(path)
        return (429, {"error": {"message": "slower"}}) if len(asked) < 3 else (200, CARDS)

    with answering(answer, (("Retry-After", "7"),)) as url:
        assert Endpoint(url).models() == CARDS["data"] and pauses == [7, 7]
    with answering(lambda *_: (429, {})) as url, pytest.raises(UserError, match="still fails after 3 tries.*429"):
        Endpoint(url, retries=2).models()
    assert pauses == [7, 7, 1, 2]
    with answering(lambda *_: (503, {}), (("Retry-After", "9999"),)) as url, pytest.raises(UserError, match="2 tries"):
        Endpoint(url, retries=1).models()
    assert pauses[-1] == 60


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        ("7", 7.0),
        ("nan", 4.0),
        ("inf", 60.0),
        ("-5", 0.0),
        ("soon", 4.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),  # a date, which is past
        ("Wed, 21 Oct 2099 07:28:00 GMT", 60.0),
        (None, 4.0),
    ],
)
def test_how_long_a_server_wants_us_to_wait(asked: str | None, seconds: float) -> None:
    assert endpoint._pause(asked, 2) == seconds


@contextmanager
def sending(first: bytes, then: bytes, pause: float) -> Iterator[str]:
    """The address of a server that sends `first`, then `then` until the client is gone, or for 20 seconds."""
    stop, end = threading.Event(), time.monotonic() + 20

    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection, suppress(OSError):
            connection.recv(65536)
            connection.sendall(first)
            while not stop.wait(pause) and time.monotonic() < end:
                connection.sendall(then)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        finally:
            stop.set()
            thread.join()


OK = b"HTTP/1.1 200 OK\r\n"
INTERIM = b"HTTP/1.1 103 Early Hints\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (OK + b"Content-Length: 100000\r\n\r\n", b" "),
        (OK + b"\r\n", b" "),  # a body that ends with the connection
        (OK, b"a: b\r\n"),  # headers
        (OK + b"a: ", b"b"),  # one header
        (b"", INTERIM),
    ],
)
def test_a_reply_that_comes_in_drops_ends_in_time(first: bytes, then: bytes) -> None:
    """Each piece of it comes in time, and the whole never does."""
    begin = time.monotonic()
    with sending(first, then, 0.05) as url:
        late = "did not answer within 0.5 seconds; raise serving.seconds"
        with pytest.raises(endpoint.Late, match=late):
            Endpoint(url, seconds=0.5, retries=0).models()
    assert time.monotonic() - begin < 10


def test_interim_responses_without_end_are_late() -> None:
    with (
        sending(b"", 1000 * INTERIM, 0) as url,
        pytest.raises(endpoint.Late, match="did not answer within 0.5 seconds"),
    ):
        Endpoint(url, seconds=0.5, retries=0).models()


def test_headers_without_end_are_no_reply() -> None:
    with sending(OK, 1000 * b"a: b\r\n", 0) as url, pytest.raises(UserError, match="cannot be reached .*too long"):
        Endpoint(url, retries=0).models()


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_a_body_without_end_is_no_reply(monkeypatch, encoding: str) -> None:
    monkeypatch.setattr(endpoint, "MOST_BYTES", 10**6)
    body, head = b" " * 2 * 10**6, f"Content-Encoding: {encoding}\r\n\r\n".encode()
    sent = gzip.compress(body) if encoding == "gzip" else body
    with sending(OK + head, sent, 0) as url, pytest.raises(UserError, match="answered with more than 1000000 bytes"):
        Endpoint(url, retries=0).models()


def test_a_reply_that_is_packed_is_unpacked() -> None:
    packed = gzip.compress(b'{"data": [{"id": "m"}]}')
    with answering(lambda *_: (200, packed), (("Content-Encoding", "gzip"),)) as url:
        assert Endpoint(url, retries=0).models() == [{"id": "m"}]


@pytest.mark.parametrize(
    "nonsense", [b"[" * 100_000, b"<html>", b"[1]", {"data": [{"name": "m"}]}, {"data": "m"}, b"", b'"text"']
)
def test_nonsense_for_a_list_of_models(nonsense: Any) -> None:
    with answering(lambda *_: (200, nonsense)) as url, pytest.raises(UserError, match="answered with no .*OpenAI"):
        Endpoint(url).models()


USAGE = {"usage": {"prompt_tokens": 3}}
LOGPROBS = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}]}


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ({"choices": []} | USAGE, UserError),
        ({"choices": [{"text": 5}]} | USAGE, UserError),
        ({"choices": [{"text": "a", "logprobs": LOGPROBS}]}, UserError),
        ({"choices": [{"text": "a", "logprobs": LOGPROBS}], "usage": {"prompt_tokens": 10**400}}, UserError),
        ({"choices": [{"text": "a", "logprobs": LOGPROBS | {"tokens": []}}]} | USAGE, UserError),
        ({"choices": [{"text": "a", "logprobs": LOGPROBS | {"token_logprobs": ["x"]}}]} | USAGE, UserError),
        *(
            ({"choices": [{"text": "a", "logprobs": LOGPROBS | given}]} | USAGE, UserError)
            for value in (math.nan, math.inf, -math.inf, True, 10**400)
            for given in ({"token_logprobs": [value]}, {"top_logprobs": [{"a": value}]})
        ),
        ({"choices": [{"text": "a", "logprobs": LOGPROBS | {"top_logprobs": [{"a": "x"}]}}]} | USAGE, UserError),
        ({"choices": [{"text": "a", "logprobs": None}]} | USAGE, Refused),
    ],
)
def test_nonsense_for_a_completion(reply: Any, error: type[Exception]) -> None:
    with answering(lambda *_: (200, reply)) as url, pytest.raises(error):
        Endpoint(url).complete("m", "a", 1)


def test_an_endpoint_that_ignores_echo() -> None:
    with answering(lambda *_: (200, {"choices": [{"text": "a", "logprobs": LOGPROBS}]} | USAGE)) as url:
        assert Endpoint(url).complete("m", "a b c", 1).logprobs == (-1.0,)
        with pytest.raises(Refused, match="ignores echo"):
            Endpoint(url).score("m", "a b c")


def test_what_an_endpoint_does_not_take_and_a_key() -> None:
    with answering(lambda *_: (404, {"detail": "Not Found"})) as url, pytest.raises(Refused, match="404"):
        Endpoint(url).chat("m", "a", 1)
    with answering(lambda *_: (401, {})) as url, pytest.raises(UserError, match="OPENAI_API_KEY"):
        Endpoint(url).models()


# the command


def served(good: int) -> Answer:
    """Ends with nonsense after so many completions. No log probabilities, and every answer is right."""
    count = iter(range(10**6))

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path.endswith("/models"):
            return 200, CARDS
        if path.endswith("/chat/completions"):
            return 404, {}
        if next(count) >= good:
            return 200, b"oops"
        tokens = max(len(body["prompt"]) // 3, 1)
        key = re.search(r"access code of (\S+) is$", body["prompt"])
        code = re.search(rf"access code of {key[1]} is (\d+)", body["prompt"]) if key else None
        return 200, {"choices": [{"text": f" {code[1]}" if code else ""}], "usage": {"prompt_tokens": tokens}}

    return answer


def test_the_command_keeps_what_is_finished(run, tmp_path: Path) -> None:
    command = ("eval", "--suite", "serving", "--k", 256, "--out", tmp_path)
    sizes = ("--set", "serving.questions=2", "--set", "serving.retries=0", "--set", "serving.contexts=[400]")
    with answering(served(4)) as url:  # one to count tokens, one for log probabilities, two questions
        broken = run(*command, *sizes, "--url", url)
        assert broken.status == 2 and "no JSON" in broken.err and broken.err.count("\n") == 1, broken.err
        assert [probe["name"] for probe in json.loads((tmp_path / "serving.json").read_text())["probes"]][:1] == [
            "answers-below"
        ]
        other = run(*command, "--url", url, "--resume")
        assert other.status == 2 and "serving.questions" in other.err
        changed = json.loads((tmp_path / "serving.json").read_text())
    with answering(served(100)) as url:
        changed["asked"]["url"] = url
        (tmp_path / "serving.json").write_text(json.dumps(changed))
        whole = run(*command, *sizes, "--url", url, "--resume")
        assert whole.status == 0 and "Nothing is wrong in what was measured: 2 of" in whole.out, whole
        record = json.loads((tmp_path / "serving.json").read_text())
        assert record["probes"][0] == changed["probes"][0] and record["diagnosis"] is None
    assert run(*command, "--url", "http://127.0.0.1:9/v1", "--set", "serving.retries=0").status == 2


def test_the_command_finds_and_measures_nothing(run, tmp_path: Path) -> None:
    """Right below k alone: status 1 and a diagnosis. Right nowhere and no log probabilities: status 2."""
    right = served(10**6)

    def up_to(characters: int) -> Answer:
        def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
            prompt = body.get("prompt", "")
            return right(path, {"prompt": prompt if len(prompt) < characters else "x" * len(prompt)})

        return answer

    command = ("eval", "--suite", "serving", "--k", 256, "--out", tmp_path, "--set", "serving.contexts=[400]")
    with answering(up_to(900)) as url:
        wrong = run(*command, "--url", url)
        assert wrong.status == 1 and "WRONG answers-400" in wrong.out and "mlx-lm #1453" in wrong.out, wrong
        assert json.loads((tmp_path / "serving.json").read_text())["diagnosis"]["failed"] == ["answers above"]
    with answering(up_to(0)) as url:
        nothing = run(*command, "--url", url)
        assert nothing.status == 2 and "nothing could be measured" in nothing.err, nothing


def test_the_command_refuses(run, tmp_path: Path) -> None:
    command = ("eval", "--suite", "serving", "--out", tmp_path)
    for options, reason in (
        ((), "name it with --url"),
        (("--url", "u", "--before", "base"), "takes no MODEL"),
        (("--set", "serving.probes=[]", "--url", "u"), "serving.probes"),
    ):
        refused = run(*command, *options)
        assert refused.status == 2 and reason in refused.err and refused.err.count("\n") == 1
    assert "--suite serving" in run("eval", "base", "--url", "u").err
    with answering(lambda *_: (200, CARDS)) as url:
        for options, reason in (
            ((), "give its index_topk with --k"),
            (("--set", "serving.model=x"), "serves no model 'x', but m"),
            (("--k", 256, "--resume"), "nothing can be resumed"),
        ):
            refused = run(*command, "--url", url, *options)
            assert refused.status == 2 and reason in refused.err, refused.err
