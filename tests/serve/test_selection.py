"""A selector of one's own on the server: its answers are those of `generate`, beside the same model with dense
attention.
"""

import httpx2 as httpx
import pytest
import torch

import tokensieve
from tests.support import servers
from tokensieve.config import UserError
from tokensieve.engine import EngineConfig
from tokensieve.model.selection import indexer, join, window
from tokensieve.serve.settings import ServeConfig

NAME = "tests.serve.test_selection:with_recent"


def with_recent(c):
    return join(indexer(c), window(c, 10))


def test_the_server_answers_as_generate_does() -> None:
    model, tokenizer = servers.tiny()
    ids = torch.randint(20, 4000, (1, 150), generator=torch.Generator().manual_seed(0))
    expected = {}
    for name, selector in (("sparse", with_recent), ("sparse:dense", "dense"), ("indexer", "indexer")):
        with torch.no_grad(), tokensieve.selecting(model, selector):
            out = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected[name] = out[0, 150:].tolist()
    assert len({tuple(answer) for answer in expected.values()}) == 3
    with servers.running((model, tokenizer), EngineConfig(pages=16, running=2, chunk=64), selection=NAME) as (at, _):
        for name in ("sparse", "sparse:dense"):
            body = {"model": name, "prompt": ids[0].tolist(), "max_tokens": 8, "ignore_eos": True}
            body |= {"return_token_ids": True, "temperature": 0}
            answer = httpx.post(at + "/v1/completions", json=body, timeout=60).json()
            assert answer["choices"][0]["token_ids"] == expected[name], name


def blind_past_100(c):
    """Keeps to the contract in short prompts, as in a trial."""
    return c.topk().masked_fill(c.ends_N[:, None] > 100, -1)


def test_the_server_outlives_a_broken_selector() -> None:
    """The request's error is the line of the check. It does not ask to send again what would end so again."""
    loaded, name = servers.tiny(), "tests.serve.test_selection:blind_past_100"
    ids = torch.randint(20, 4000, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    with servers.running(loaded, EngineConfig(pages=16, running=2, chunk=64), selection=name) as (at, _):
        for route, body in (("/v1/completions", {"prompt": ids, "max_tokens": 4}), ("/lens", {"token_ids": ids})):
            answer = httpx.post(at + route, json={"model": "sparse"} | body, timeout=60)
            message = answer.json()["error"]["message"]
            assert answer.status_code == 500 and message.endswith(
                "no key, though it sees some; give each query at least one"
            )
            dense = httpx.post(at + route, json={"model": "sparse:dense"} | body, timeout=60)
            assert dense.status_code == 200
        short = {"model": "sparse", "prompt": ids[:50], "max_tokens": 4}
        assert httpx.post(at + "/v1/completions", json=short, timeout=60).status_code == 200


def test_dense_attention_has_one_name_and_no_mirror() -> None:
    for selection in ("dense", "tokensieve.model.selection:dense"):
        served = ServeConfig("sparse", selection=selection)
        assert served.models == ("sparse",) and served.selector_of("sparse") == selection
        with pytest.raises(UserError, match="compares dense attention with itself"):
            ServeConfig("sparse", selection=selection, mirror=0.5)
    assert ServeConfig("sparse", selection="window", mirror=0.5).models == ("sparse", "sparse:dense")


def test_an_unknown_one_is_refused_before_anything_is_served() -> None:
    with pytest.raises(UserError, match="there is no module nowhere"):
        ServeConfig("sparse", selection="nowhere:f")


@pytest.mark.parametrize("selection", ["DenseBelow(60)", "DenseIfSpread(0.9)", "PerLayer([8])"])
def test_options_are_written_in_the_name(selection: str) -> None:
    """A model that stays dense below a length or where attention is spread answers as `generate` does."""
    (model, tokenizer), name = servers.tiny(), f"tokensieve.selectors:{selection}"
    with servers.running((model, tokenizer), EngineConfig(pages=16, running=2, chunk=64), selection=name) as (at, _):
        for tokens in (40, 150):
            ids = torch.randint(20, 4000, (1, tokens), generator=torch.Generator().manual_seed(tokens))
            with torch.no_grad(), tokensieve.selecting(model, name):
                out = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
            body = {"model": "sparse", "prompt": ids[0].tolist(), "max_tokens": 8, "ignore_eos": True}
            body |= {"return_token_ids": True, "temperature": 0}
            answer = httpx.post(at + "/v1/completions", json=body, timeout=60).json()
            assert answer["choices"][0]["token_ids"] == out[0, tokens:].tolist(), answer
