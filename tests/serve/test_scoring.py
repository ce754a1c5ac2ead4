"""Prompts that are scored: `echo` and `logprobs`, as evaluation harnesses ask for them; and limits of answers."""

from collections.abc import Iterator

import openai
import pytest
import torch

import tokensieve
from tests.support import servers
from tokensieve.engine import EngineConfig
from tokensieve.model import DecoderForCausalLM

IDS = [0, *torch.randint(20, 4000, (149,), generator=torch.Generator().manual_seed(0)).tolist()]


@pytest.fixture(scope="module")
def loaded() -> tuple[DecoderForCausalLM, object]:
    return servers.tiny()


@pytest.fixture(scope="module")
def client(loaded) -> Iterator[openai.OpenAI]:
    with servers.running(loaded, EngineConfig(pages=64, running=16, chunk=64), max_tokens=40) as (at, _):
        yield openai.OpenAI(base_url=at + "/v1", api_key="none", max_retries=0)


def test_the_prompts_log_probabilities_are_the_models(loaded, client: openai.OpenAI) -> None:
    """In chunks of 64, twice, so that the second time the cache has the prompt's pages; beside another prompt."""
    asked = {"model": "sparse", "prompt": [IDS, IDS[:3]], "logprobs": 1, "temperature": 0}
    with torch.inference_mode():
        logprobs = loaded[0](torch.tensor([IDS])).logits[0].float().log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    for tokens in (0, 1):
        answer = client.completions.create(**asked, max_tokens=tokens, echo=True)
        whole, short = answer.choices
        scores = whole.logprobs.token_logprobs
        assert scores[0] is None and whole.logprobs.top_logprobs[0] is None and len(scores) == len(IDS) + tokens
        torch.testing.assert_close(torch.tensor(scores[1 : len(IDS)]), expected, rtol=1e-4, atol=1e-4)
        best = [max(top.values()) for top in whole.logprobs.top_logprobs[1 : len(IDS)]]
        torch.testing.assert_close(torch.tensor(best), logprobs[:-1].max(-1).values, rtol=1e-4, atol=1e-4)
        assert all(score in top.values() for score, top in zip(scores[1:], whole.logprobs.top_logprobs[1:]))
        assert short.logprobs.token_logprobs[:3] == pytest.approx([None, *scores[1:3]], abs=1e-4)
        assert whole.finish_reason == "length" and answer.usage.completion_tokens == 2 * tokens
    plain = client.completions.create(**asked, max_tokens=1)
    assert [c.logprobs.token_logprobs[0] for c in plain.choices] == [
        c.logprobs.token_logprobs[-1] for c in answer.choices
    ]


def test_the_prompts_text_comes_first(client: openai.OpenAI) -> None:
    asked = {"model": "sparse", "prompt": "import os 🙂\n", "max_tokens": 3, "temperature": 0, "echo": True}
    whole = client.completions.create(**asked, logprobs=0).choices[0]
    assert whole.text.startswith("import os 🙂\n") and len(whole.text) > len("import os 🙂\n")
    ids = tokensieve.load_tokenizer("sparse")("import os 🙂\n", add_special_tokens=False).input_ids
    offsets = whole.logprobs.text_offset
    assert len(offsets) == 1 + len(ids) + 3  # with the tokenizer's first token, which the text lacks
    assert offsets[:2] == [0, 0] and offsets[1 + len(ids)] == len("import os 🙂\n")
    chunks = list(client.completions.create(**asked, stream=True, logprobs=0))
    assert "".join(c.choices[0].text for c in chunks) == whole.text
    told = [score for c in chunks for score in c.choices[0].logprobs.token_logprobs]
    assert told == whole.logprobs.token_logprobs
    silent = client.completions.create(**asked | {"max_tokens": 0}).choices[0]
    assert (silent.text, silent.finish_reason, silent.logprobs) == ("import os 🙂\n", "length", None)
    with pytest.raises(openai.BadRequestError, match="max_tokens is 0"):
        client.completions.create(**asked | {"max_tokens": 0, "echo": False})


def test_an_answer_is_no_shorter_than_was_asked(client: openai.OpenAI) -> None:
    """Neither an end token nor a stop string ends it before."""
    asked = {"model": "sparse", "prompt": IDS[:9], "max_tokens": 12, "temperature": 0, "logprobs": 0}
    eos = tokensieve.load_tokenizer("sparse").eos_token_id
    for early in ({"logit_bias": {str(eos): 100}}, {"stop": [*"abcdefghijklmnopqrstuvwxyz_ \n"]}):
        short = client.completions.create(**asked, **early)
        assert short.choices[0].finish_reason == "stop" and short.usage.completion_tokens < 6
        longer = client.completions.create(**asked, **early, extra_body={"min_tokens": 6})
        assert 6 <= longer.usage.completion_tokens <= 12
        free = client.completions.create(**asked)
        assert longer.choices[0].logprobs.tokens[:5] == free.choices[0].logprobs.tokens[:5]


def test_a_limit_above_the_room_is_cut(client: openai.OpenAI) -> None:
    for limit in (32000, -1):
        asked = {"model": "sparse", "prompt": IDS[:9], "max_tokens": limit, "extra_body": {"ignore_eos": True}}
        assert client.completions.create(**asked).usage.completion_tokens == 40
