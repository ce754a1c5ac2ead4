"""Several answers to one request: `n` for one prompt or for each of several, whole and as interleaved streams."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest

from tests.support import servers
from tokensieve.engine import EngineConfig, Service

CHAT = {"model": "sparse", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 6, "seed": 7}
COMPLETION = {"model": "sparse", "prompt": "import ", "max_tokens": 6, "seed": 7}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Service]]:
    with servers.running(servers.tiny(), EngineConfig(pages=64, running=16, chunk=64)) as both:
        yield both


@pytest.fixture(scope="module")
def client(served: tuple[str, Service]) -> openai.OpenAI:
    return openai.OpenAI(base_url=served[0] + "/v1", api_key="none", max_retries=0)


def streamed(chunks: Any) -> tuple[dict[int, list[Any]], Any]:
    """The choices by their number, in the order in which they came, and the usage."""
    found, usage = defaultdict(list), None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            found[choice.index].append(choice)
    return found, usage


def test_chat_n(client: openai.OpenAI) -> None:
    asked = CHAT | {"logprobs": True, "extra_body": {"return_token_ids": True}}
    whole = client.chat.completions.create(**asked, n=4)
    assert [c.index for c in whole.choices] == [0, 1, 2, 3]
    texts = [c.message.content for c in whole.choices]
    assert len(set(texts)) == 4 and all(c.finish_reason == "length" for c in whole.choices)
    one = client.chat.completions.create(**asked)
    assert one.choices[0] == whole.choices[0] and one.prompt_token_ids == whole.prompt_token_ids
    assert whole.usage.prompt_tokens == one.usage.prompt_tokens and whole.usage.completion_tokens == 24
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 24
    chunks = client.chat.completions.create(**asked, n=4, stream=True, stream_options={"include_usage": True})
    found, usage = streamed(chunks)
    assert usage.model_dump() == whole.usage.model_dump() and sorted(found) == [0, 1, 2, 3]
    for number, choices in found.items():
        assert choices[0].delta.role == "assistant" and [c.finish_reason for c in choices[:-1]] == [None] * (
            len(choices) - 1
        )
        assert "".join(c.delta.content or "" for c in choices) == texts[number]
        assert choices[-1].finish_reason == "length"
        told = [t for c in choices if c.logprobs for t in c.logprobs.content]
        assert told == whole.choices[number].logprobs.content
        assert [id for c in choices for id in getattr(c, "token_ids", [])] == whole.choices[number].token_ids


def test_seeds_that_follow_each_other_share_no_answer(client: openai.OpenAI) -> None:
    texts = [c.text for seed in (7, 8) for c in client.completions.create(**COMPLETION | {"seed": seed}, n=3).choices]
    assert len(set(texts)) == 6
    last = client.completions.create(**COMPLETION | {"seed": 2**64 - 1}, n=3)
    assert len({c.text for c in last.choices}) == 3


def test_several_prompts(client: openai.OpenAI) -> None:
    """Each prompt gets the answers that it gets alone, and they are numbered prompt by prompt."""
    prompts = ["import ", "def f(", "Ä"]
    for given in (prompts, [[0, 100, 200], [0, 300], [0, 400, 500, 600]]):
        alone = [client.completions.create(**COMPLETION | {"prompt": prompt}, n=2) for prompt in given]
        whole = client.completions.create(**COMPLETION | {"prompt": given}, n=2, logprobs=1)
        texts = [c.text for c in whole.choices]
        assert texts == [c.text for one in alone for c in one.choices] and [c.index for c in whole.choices] == list(
            range(6)
        )
        assert whole.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
        assert whole.usage.completion_tokens == 36
        found, _ = streamed(client.completions.create(**COMPLETION | {"prompt": given}, n=2, stream=True))
        assert ["".join(c.text for c in found[number]) for number in range(6)] == texts


def test_answers_share_the_pages_of_their_prompt(client: openai.OpenAI) -> None:
    prompt = [0, *range(100, 299)]
    first = client.completions.create(**COMPLETION | {"prompt": prompt}, n=4)
    assert first.usage.prompt_tokens == 200 and first.usage.prompt_tokens_details.cached_tokens == 0
    again = client.completions.create(**COMPLETION | {"prompt": [prompt, [0, 5]]}, n=2)
    assert again.usage.prompt_tokens == 202 and again.usage.prompt_tokens_details.cached_tokens == 192
    assert [c.text for c in again.choices[:2]] == [c.text for c in first.choices[:2]]


def test_one_that_fails_ends_all(served: tuple[str, Service]) -> None:
    at, service = served
    body = COMPLETION | {"prompt": [[0, 5], [99999]], "max_tokens": 200, "stream": True}
    refused = httpx.post(at + "/v1/completions", json=body)
    assert refused.status_code == 400 and "vocabulary" in refused.json()["error"]["message"]
    servers.settled(service, 1)
