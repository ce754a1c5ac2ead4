"""`tokensieve serve` as a process: its address, its end, and what it refuses."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx2 as httpx
import pytest

from tests.support import commands

refuse = commands.refusal


@pytest.fixture
def process():
    """A server process, and its address."""
    environment = os.environ | {"TOKENSIEVE_API_KEY": "a-key", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tokensieve", "serve", "sparse", "--port", "0", "--pages", "64", "--running", "2"]
    few_files = ["prlimit", "--nofile=100:", "--"]
    started = subprocess.Popen(
        few_files + command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    line = started.stdout.readline()
    assert "serves sparse and sparse:dense" in line, started.stderr.read()
    yield started, line.split("/v1 ")[0]
    started.kill()
    started.communicate()


def test_a_signal_lets_everybody_finish(process) -> None:
    started, at = process
    key = {"Authorization": "Bearer a-key"}
    asked = {"model": "sparse", "prompt": "def ", "max_tokens": 60, "seed": 3}
    assert httpx.post(at + "/v1/completions", json=asked).status_code == 401
    with httpx.stream("POST", at + "/v1/completions", json=asked | {"stream": True}, headers=key, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        started.send_signal(signal.SIGTERM)
        end = time.monotonic() + 5
        while httpx.get(at + "/health").status_code != 503:
            assert time.monotonic() < end
        refused = httpx.post(at + "/v1/completions", json=asked, headers=key)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "unavailable"
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("length", "stop")
    _, told = started.communicate(timeout=30)
    assert started.returncode == 0 and "Traceback" not in told, told
    lines = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert [line["status"] for line in lines] == [401, 503, 200]


@pytest.mark.slow
def test_more_clients_than_a_process_may_first_have_files(process) -> None:
    _, at = process
    host, port = at.removeprefix("http://").split(":")
    crowd = [socket.create_connection((host, int(port))) for _ in range(200)]
    assert httpx.get(at + "/health", timeout=3).status_code == 200
    for connection in crowd:
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_second_signal_ends_at_once(process, number: signal.Signals) -> None:
    started, at = process
    # so many answers that some are still running at the second signal
    asked = {"model": "sparse", "prompt": ["def "] * 60, "max_tokens": 1000, "ignore_eos": True, "stream": True}
    key = {"Authorization": "Bearer a-key"}
    with httpx.stream("POST", at + "/v1/completions", json=asked, headers=key, timeout=60) as answer:
        lines = answer.iter_lines()  # held: the connection closes with it
        next(lines)
        started.send_signal(number)
        while httpx.get(at + "/health").status_code != 503:
            pass
        begin = time.monotonic()
        started.send_signal(number)
        assert started.wait(20) == 128 + number
        assert time.monotonic() - begin < 3
    told = [line for line in started.stderr.read().splitlines() if not line.startswith("{")]
    assert told[-1] == f"tokensieve: ended by a second signal ({number.name}); 60 answers are cut off"
    assert not [line for line in told if "Traceback" in line or "terminate" in line]


def test_refusals(run, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refuse(run)(("cannot listen", "--port"), "serve", "sparse", "--port", taken.getsockname()[1])
    refuse(run)(("mirror", "between 0 and 1"), "serve", "sparse", "--port", 0, "--mirror", "2")
    refuse(run)(("mirror", "dense"), "serve", "base", "--port", 0, "--mirror", "0.5")
    refuse(run)(("--selection window", "base is dense"), "serve", "base", "--port", 0, "--selection", "window")
    refuse(run)(("API key",), "serve", "sparse", "--port", 0, "--api-key", "")
    refuse(run)(("'x' is no origin",), "serve", "sparse", "--port", 0, "--allow-origin", "x")
    refuse(run)(("'a:80' is no host",), "serve", "sparse", "--port", 0, "--allow-host", "a:80")
    refuse(run)(("99999999999 pages", "choose at most"), "serve", "sparse", "--port", 0, "--pages", 99_999_999_999)
    monkeypatch.setenv("TOKENSIEVE_API_KEY", " ")
    refuse(run)(("TOKENSIEVE_API_KEY is set and empty",), "serve", "sparse", "--port", 0)
    monkeypatch.delenv("TOKENSIEVE_API_KEY")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "fastapi" else find(name, *more)
    )
    refuse(run)(("serve needs fastapi", "pip install 'tokensieve[serve]'"), "serve", "sparse")
