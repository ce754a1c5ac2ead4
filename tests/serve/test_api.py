"""The server over HTTP: OpenAI's own client against the bundled sparse model, and what a client must not do."""

import json
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2 as httpx
import openai
import pytest

import tokensieve
from tests.support import servers
from tests.support.servers import settled
from tokensieve.engine import EngineConfig, Output, Service, TokenLogprob
from tokensieve.serve.completion_format import CompletionChoice
from tokensieve.serve.token_texts import TokenTexts

QUESTION = [{"role": "user", "content": "Who are you?"}]
WHO = "I am the tokensieve base model"


@pytest.fixture(scope="module")
def loaded():
    return tokensieve.load("sparse"), tokensieve.load_tokenizer("sparse")


@contextmanager
def running(loaded, waiting: int = 8, **settings) -> Iterator[tuple[str, Service]]:
    """The server's address, and its service."""
    with servers.running(loaded, EngineConfig(pages=64, running=4), waiting, **settings) as both:
        yield both


@pytest.fixture(scope="module")
def served(loaded) -> Iterator[tuple[str, Service]]:
    with running(loaded) as both:
        yield both


@pytest.fixture(scope="module")
def client(served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served[0] + "/v1", api_key="none", max_retries=0)


# answers


def test_models(client) -> None:
    assert [m.id for m in client.models.list()] == ["sparse", "sparse:dense"]
    assert client.models.retrieve("sparse:dense").id == "sparse:dense"


@pytest.mark.parametrize("model", ["sparse", "sparse:dense"])
def test_chat(client, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=40)
    choice = answer.choices[0]
    assert choice.message.content.startswith(WHO) and choice.message.role == "assistant"
    assert choice.finish_reason == "stop" and answer.model == model and answer.id.startswith("chatcmpl-")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}]}]
    again = client.chat.completions.create(model=model, messages=parts, temperature=0, max_completion_tokens=3)
    assert again.choices[0].finish_reason == "length" and again.usage.completion_tokens == 3


def test_the_progress_of_a_prompt_streams_if_it_is_wanted(loaded) -> None:
    """Only a client that asks for it gets other chunks; openai's client passes over them."""
    engine = EngineConfig(pages=64, running=4, chunk=64, prefix_cache=False)
    with servers.running(loaded, engine, max_prompt_tokens=0) as (at, service):
        client = openai.OpenAI(base_url=at + "/v1", api_key="none", max_retries=0)
        asked = {"model": "sparse", "messages": [{"role": "user", "content": "word " * 150}], "max_tokens": 3}
        asked |= {"temperature": 0, "stream": True, "n": 2, "stream_options": {"include_usage": True}}
        extra = {"return_token_ids": True}
        usual = list(client.chat.completions.create(**asked, extra_body=extra))
        assert all("prompt_progress" not in chunk.model_extra for chunk in usual)
        chunks = list(client.chat.completions.create(**asked, extra_body=extra | {"return_progress": True}))
        told = [chunk for chunk in chunks if "prompt_progress" in chunk.model_extra]
        total = usual[-1].usage.prompt_tokens
        assert told == chunks[: len(told)] and [chunk.choices for chunk in told] == [[]] * len(told)
        progress = [chunk.prompt_progress for chunk in told]
        assert [one["processed"] for one in progress] == list(range(64, total, 64)) and len(progress) > 1
        assert {(one["total"], one["cache"]) for one in progress} == {(total, 0)}
        times = [one["time_ms"] for one in progress]
        assert times == sorted(times) and times[-1] > 0
        assert [len(chunk.model_extra.get("prompt_token_ids", [])) for chunk in chunks[:2]] == [total, 0]
        assert [chunk.choices for chunk in chunks[len(told) :]] == [chunk.choices for chunk in usual]

        with pytest.raises(openai.BadRequestError, match="return_progress is for stream: true"):
            client.completions.create(model="sparse", prompt="a", extra_body={"return_progress": True})

        # an error that comes while the prompt is read is an event of the stream
        with client.chat.completions.create(**asked, extra_body={"return_progress": True}) as stream:
            next(stream)
            service.stop(drain=False)
            with pytest.raises(openai.APIError, match="stopping"):
                list(stream)


def test_chat_streams_the_same(client) -> None:
    asked = {"model": "sparse", "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    chunks = list(
        client.chat.completions.create(
            **asked, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices == []
    assert chunks[-1].usage.model_dump() == whole.usage.model_dump()
    assert len({(c.id, c.created) for c in chunks}) == 1
    said = [c.choices[0] for c in chunks[:-1]]
    assert "".join(c.delta.content or "" for c in said) == whole.choices[0].message.content
    assert [c.finish_reason for c in said] == [None] * (len(said) - 1) + ["length"]
    told = [t for c in said if c.logprobs for t in c.logprobs.content]
    assert told == whole.choices[0].logprobs.content and len(told) == 12
    text = b"".join(bytes(t.bytes) for t in told).decode()
    assert text == whole.choices[0].message.content
    for one in told:
        assert one.logprob <= 0 and len(one.top_logprobs) == 2 and one.top_logprobs[0].token == one.token


def test_completions(client) -> None:
    asked = {"model": "sparse", "prompt": "import os\nimport ", "temperature": 0, "max_tokens": 6}
    whole = client.completions.create(**asked, logprobs=1)
    choice = whole.choices[0]
    assert whole.object == "text_completion" and "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset[0] == 0 and len(choice.logprobs.token_logprobs) == 6
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == choice.text
    assert client.completions.create(**asked | {"prompt": ["import os\nimport "]}).choices[0].text == choice.text
    ids = [0, *tokensieve.load_tokenizer("sparse")("import os\nimport ").input_ids]
    assert client.completions.create(**asked | {"prompt": ids}).choices[0].text == choice.text


def test_halves_of_a_character_have_names_of_their_own() -> None:
    """A completion's logprobs name the alternatives by their text. The token itself is among them."""
    tokenizer = tokensieve.load_tokenizer("sparse")
    ids = tokenizer("a🙂b", add_special_tokens=False).input_ids
    answer = CompletionChoice(TokenTexts(tokenizer), logprobs=True)
    told = [TokenLogprob(token, -1.0, ((ids[0], -0.5), (ids[1], -2.0))) for token in ids]
    answer.push(Output("id", "a🙂b", tuple(ids), tuple(told), "stop"))
    found = answer.whole()["logprobs"]
    assert (
        found["tokens"][0] == "a"
        and found["tokens"][1].startswith("bytes:\\xf0")
        and len(set(found["tokens"])) == len(ids)
    )
    assert found["text_offset"] == [0, *[1] * (len(ids) - 2), 2]
    assert found["top_logprobs"][-1] == {"a": -0.5, found["tokens"][1]: -2.0, "b": -1.0}


def test_a_seed_repeats_whatever_runs_beside(client) -> None:
    def draw(seed: int, tokens: int = 16) -> str:
        answer = client.completions.create(model="sparse", prompt="def ", seed=seed, max_tokens=tokens)
        return answer.choices[0].text

    alone = draw(7)
    with ThreadPoolExecutor(6) as pool:
        beside = [pool.submit(draw, seed, 10 + seed) for seed in range(4)]
        again = [pool.submit(draw, 7) for _ in range(2)]
        assert [f.result() for f in again] == [alone, alone]
        assert len({f.result() for f in beside}) == 4


def test_stop_and_the_extensions(client) -> None:
    asked = {"model": "sparse", "messages": QUESTION, "temperature": 0, "max_tokens": 40}
    answer = client.chat.completions.create(**asked, stop=[" base", "zzz"])
    assert answer.choices[0].message.content == "I am the tokensieve" and answer.choices[0].finish_reason == "stop"
    greedy = client.chat.completions.create(**asked | {"temperature": 5}, extra_body={"top_k": 1})
    assert greedy.choices[0].message.content.startswith(WHO)
    other = client.chat.completions.create(**asked, extra_body={"repetition_penalty": 5.0, "min_p": 0.1})
    assert other.choices[0].finish_reason in ("stop", "length")


def test_thinking_is_told_apart(client) -> None:
    asked = {"model": "sparse", "messages": QUESTION, "temperature": 0, "max_tokens": 8}
    messages = [*QUESTION, {"role": "assistant", "content": "<think>Well"}]
    told = client.chat.completions.create(**asked | {"messages": messages}, extra_body={"continue_final_message": True})
    assert told.usage.completion_tokens_details.reasoning_tokens == told.usage.completion_tokens > 0
    assert told.choices[0].message.reasoning_content and not told.choices[0].message.content
    calm = client.chat.completions.create(**asked, reasoning_effort="none")
    assert calm.usage.completion_tokens_details.reasoning_tokens == 0


def test_an_answer_obeys_its_schema(client) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
        "required": ["age", "ok"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    answer = client.chat.completions.create(
        model="sparse", messages=QUESTION, response_format=wanted, max_tokens=100, seed=1
    )
    assert answer.choices[0].finish_reason == "stop", answer
    text = answer.choices[0].message.content
    told = json.loads(text)
    assert set(told) == {"age", "ok"} and 0 <= told["age"] <= 99
    assert text == json.dumps(told)  # and no other spaces


def test_a_prompt_that_was_there_is_found(client) -> None:
    prompt = [0, *range(100, 690)]
    first, second = (client.completions.create(model="sparse", prompt=prompt, max_tokens=1) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == 512


# refusals

CHAT = {"model": "sparse", "messages": QUESTION, "max_tokens": 2}
COMPLETION = {"model": "sparse", "prompt": "a", "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
NESTED: dict = {"type": "object"}
for _ in range(200):
    NESTED = {"type": "object", "properties": {"a": NESTED}}
REFUSED = [
    (
        "chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": NESTED}}},
        400,
        "cannot be followed",
    ),
    ("chat/completions", {"model": "gpt"}, 404, "no model 'gpt'"),
    ("chat/completions", {"messages": []}, 400, "messages"),
    ("chat/completions", {"messages": "hello"}, 400, "messages"),
    ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, 400, "role"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "roles are"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text"),
    ("chat/completions", {"tools": [TOOL]}, 400, "knows no tools"),
    ("chat/completions", {"n": 0}, 400, "n: "),
    ("chat/completions", {"n": 129}, 400, "n: "),
    ("chat/completions", {"n": 20}, 400, "20 answers are asked for at once, and 12"),
    ("completions", {"n": 65, "prompt": ["a", "b"]}, 400, "more than 128 answers"),
    ("completions", {"prompt": ["a", "b"], "return_token_ids": True}, 400, "one prompt"),
    ("completions", {"prompt": ["a", "b"], "stream": True, "return_progress": True}, 400, "one prompt"),
    ("chat/completions", {"logit_bias": {"5": 101}}, 400, "logit_bias"),
    ("chat/completions", {"logit_bias": {"a": 1}}, 400, "logit_bias"),
    ("chat/completions", {"logit_bias": {"99999": 1}}, 400, "logit_bias"),
    ("chat/completions", {"presence_penalty": 2.5}, 400, "presence_penalty"),
    ("chat/completions", {"top_logprobs": 2}, 400, "logprobs"),
    ("chat/completions", {"stream_options": {"include_usage": True}}, 400, "stream"),
    ("chat/completions", {"response_format": {"type": "json_schema"}}, 400, "json_schema"),
    (
        "chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "cow"}}}},
        400,
        "schema",
    ),
    ("chat/completions", {"reasoning_effort": "max"}, 400, "leave reasoning_effort out"),
    ("chat/completions", {"thinking": {"type": "enabled"}}, 400, "leave thinking out"),
    ("chat/completions", {"thinking": {"type": "disabled"}, "reasoning_effort": "none"}, 200, ""),
    ("chat/completions", {"chat_template_kwargs": {"thinking": True, "enable_thinking": False}}, 400, "both"),
    ("chat/completions", {"max_tokens": 0}, 400, "max_tokens is 0"),
    ("chat/completions", {"max_tokens": -2}, 400, "max_tokens"),
    ("chat/completions", {"min_tokens": 3}, 400, "min_tokens is 3"),
    ("chat/completions", {"min_tokens": 1, "response_format": {"type": "json_object"}}, 400, "min_tokens"),
    ("chat/completions", {"continue_final_message": True}, 400, "last message of the assistant"),
    ("chat/completions", {"echo": True}, 400, "echo"),
    ("completions", {"prompt": ""}, 200, ""),  # the first token alone
    ("completions", {"prompt": []}, 400, "empty"),
    ("completions", {"prompt": [5, -1]}, 400, "vocabulary"),
    ("completions", {"prompt": [99999]}, 400, "vocabulary"),
    ("completions", {"prompt": [5] * 601}, 400, "601 tokens"),
    ("completions", {"prompt": "\ud800"}, 400, "prompt"),
    ("chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, 400, ""),
    ("completions", {"model": "\ud800"}, 404, "no model"),
    ("completions", {"\ud800": 1}, 400, ""),
    ("completions", {"max_tokens": 0}, 400, "max_tokens"),
    ("completions", {"temperature": -1}, 400, "temperature"),
    ("completions", {"temperature": "1"}, 400, "temperature"),
    ("completions", {"temperature": float("nan")}, 400, "temperature"),
    ("completions", {"seed": -(2**63) - 1}, 400, "seed"),
    ("completions", {"seed": 2**70}, 400, "seed"),
    ("completions", {"stop": ["x"] * 1000}, 400, "stop"),
    ("completions", {"stop": [""]}, 400, "stop"),
    ("completions", {"logprobs": 21}, 400, "logprobs"),
    ("completions", {"suffix": "x"}, 400, "suffix"),
    ("completions", {"temprature": 1}, 400, "temprature"),
    ("completions", {"user": "me", "frequency_penalty": 0}, 200, ""),
    ("completions", {"verbosity": "low", "skip_special_tokens": True, "temperature": 1e-7, "top_k": -1}, 200, ""),
    ("completions", {"seed": -1, "stop_token_ids": []}, 200, ""),
    ("completions", {"stop_token_ids": [5]}, 400, "stop_token_ids is not supported"),
    ("completions", {"n": None, "seed": None, "logit_bias": None}, 200, ""),
    ("completions", {"model": None}, 400, "model"),
]


def is_error(response, status: int, words: str = "") -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and words in error["message"], error
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
    assert error["type"] == ("server_error" if status >= 500 else kind)


# Options for streams are an error only if the request is no stream.
ASKED = [
    (*case, stream) for case in REFUSED for stream in (False, True) if not (stream and "stream_options" in case[1])
]


@pytest.mark.parametrize(("route", "changes", "status", "words", "stream"), ASKED)
def test_refusals(served, route: str, changes: dict, status: int, words: str, stream: bool) -> None:
    asked = (CHAT if route.startswith("chat") else COMPLETION) | changes | ({"stream": True} if stream else {})
    body = json.dumps(asked).encode()
    response = httpx.post(f"{served[0]}/v1/{route}", content=body, headers={"Content-Type": "application/json"})
    if status == 200:
        assert response.status_code == 200, response.text
    else:
        is_error(response, status, words)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b"null", b'{"model": "\xff"}', b"\xff\xfe", b"[" * 9000])
def test_bodies_that_are_no_request(served, body: bytes) -> None:
    for route in ("chat/completions", "completions"):
        is_error(httpx.post(f"{served[0]}/v1/{route}", content=body, headers={"Content-Type": "application/json"}), 400)


def test_other_routes_and_sizes(served, client) -> None:
    is_error(httpx.get(served[0] + "/v1/nothing"), 404, "no such route")
    is_error(httpx.get(served[0] + "/v1/completions"), 405)
    long = COMPLETION | {"prompt": "a " * 15_000}
    is_error(httpx.post(served[0] + "/v1/completions", json=long), 413, "20000 bytes")

    def pieces() -> Iterator[bytes]:  # without a Content-Length
        for _ in range(50):
            yield b"x" * 1000

    is_error(httpx.post(served[0] + "/v1/completions", content=pieces()), 413, "20000 bytes")
    with pytest.raises(openai.NotFoundError) as wrong:
        client.chat.completions.create(model="gpt", messages=QUESTION)
    assert wrong.value.code == "model_not_found" and wrong.value.param == "model"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="sparse", prompt=[5] * 700)
    assert wrong.value.code == "context_length_exceeded"


def test_keys(loaded) -> None:
    with running(loaded, keys=("first-key", "second-key")) as (at, _):
        assert httpx.get(at + "/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/docs", "/openapi.json", "/nothing", "/health/"):
            for headers in ({}, {"Authorization": "Bearer first"}, {"Authorization": "Basic first-key"}):
                is_error(httpx.get(at + path, headers=headers), 401, "API key")
        is_error(httpx.post(at + "/v1/completions", json=COMPLETION), 401)
        for key in ("first-key", "second-key"):
            assert openai.OpenAI(base_url=at + "/v1", api_key=key).models.list().data
            assert httpx.get(at + "/metrics", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        with pytest.raises(openai.AuthenticationError) as wrong:
            openai.OpenAI(base_url=at + "/v1", api_key="third-key").models.list()
        assert wrong.value.code == "invalid_api_key"


def test_a_full_queue_and_an_engine_that_ends(loaded) -> None:
    with running(loaded, waiting=0) as (at, service):
        asked = COMPLETION | {"max_tokens": 200, "stream": True, "temperature": 1.0}
        with ThreadPoolExecutor(4) as pool:
            busy = [pool.submit(httpx.post, at + "/v1/completions", json=asked, timeout=60) for _ in range(4)]
            while service.open < 4:
                time.sleep(0.01)
            refused = httpx.post(at + "/v1/completions", json=COMPLETION)
            is_error(refused, 429, "try again")
            assert refused.headers["Retry-After"]
            service.stop(drain=False)
            for one in busy:
                text = one.result().text
                assert ('"error"' in text and "stopping" in text) or "[DONE]" in text
        assert httpx.get(at + "/health").status_code == 503
        is_error(httpx.post(at + "/v1/completions", json=COMPLETION), 503)


def test_a_failing_step_is_an_error_and_then_it_goes_on(served, client, monkeypatch) -> None:
    service, calls = served[1], []
    whole = service.engine.runner.step

    def fails(*arguments: object) -> object:
        calls.append(1)
        return whole(*arguments) if len(calls) < 3 else 1 / 0

    monkeypatch.setattr(service.engine.runner, "step", fails)
    asked = {"model": "sparse", "prompt": "a", "max_tokens": 30, "seed": 1, "temperature": 1.0}
    with pytest.raises(openai.InternalServerError) as failed:
        client.completions.create(**asked)
    assert failed.value.code == "engine_error"
    calls.clear()
    with pytest.raises(openai.APIError, match="ZeroDivisionError"):
        list(client.completions.create(**asked, stream=True))
    monkeypatch.undo()
    assert client.completions.create(**asked).usage.completion_tokens > 0
    settled(service)


# clients that leave, the log, the metrics


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_gives_its_pages_back(served, stream: bool) -> None:
    at, service = served
    body = json.dumps(COMPLETION | {"max_tokens": 200, "stream": stream, "temperature": 1.0, "seed": 3}).encode()
    host, port = at.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if stream:
            assert b"200 OK" in connection.recv(1000)
        while not service.engine.scheduler.running:
            time.sleep(0.005)
    begin = time.monotonic()
    settled(service)
    assert time.monotonic() - begin < 3


def test_log_lines_and_metrics(served, client, caplog) -> None:
    with caplog.at_level(logging.INFO, "tokensieve.serve"):
        client.completions.create(model="sparse", prompt="a secret of mine", max_tokens=3)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="gpt", prompt="a secret of mine")
        time.sleep(0.05)
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "tokensieve.serve"]
    assert [(line["status"], line["finish"], line["completion_tokens"]) for line in lines] == [
        (200, "length", 3),
        (404, None, 0),
    ]
    assert lines[0]["model"] == "sparse" and lines[0]["seconds"] > 0 and "secret" not in caplog.text
    page = httpx.get(served[0] + "/metrics").text
    figures = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line[0] != "#"}
    assert figures["tokensieve_running"] == 0 and figures["tokensieve_pages"] == 64
    assert figures['tokensieve_requests_total{finish="length",route="/v1/completions",status="200"}'] >= 1
    assert figures['tokensieve_completion_tokens_total{model="sparse"}'] >= 3
    assert figures['tokensieve_first_token_seconds_count{model="sparse"}'] >= 1
    assert figures['tokensieve_next_token_seconds_count{model="sparse"}'] >= 2
    assert {"tokensieve_waiting", "tokensieve_pages_used", "tokensieve_preemptions_total"} <= set(figures)


def test_mirror(loaded, caplog) -> None:
    with caplog.at_level(logging.INFO, "tokensieve.serve"), running(loaded, mirror=1.0) as (at, _):
        for model in ("sparse", "sparse:dense"):
            httpx.post(at + "/v1/completions", json=COMPLETION | {"max_tokens": 5, "model": model})
        end = time.monotonic() + 10
        while caplog.text.count('"mirror"') < 2 and time.monotonic() < end:
            time.sleep(0.02)
    told = [json.loads(r.getMessage()) for r in caplog.records if '"mirror"' in r.getMessage()]
    # a context shorter than k: both kinds are the same function
    assert [(t["agreement"], t["first_difference"], t["tokens"]) for t in told] == [(1.0, None, [5, 5])] * 2
    assert {t["selection"] for t in told} == {"indexer", "dense"}
