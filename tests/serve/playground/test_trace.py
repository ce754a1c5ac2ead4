"""The attention trace. Its selections are those of the model's own pass, its shares those of a naive computation."""

import json
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch

import tokensieve
from tests.engine.test_engine import SMALL, prompt
from tests.serve.test_api import QUESTION, client, loaded, running, served  # noqa: F401
from tests.support.models import config, ours
from tokensieve.engine import Engine, Output, Request, Sampling
from tokensieve.model.attention import Attention
from tokensieve.serve.playground import trace

TOKENIZER = tokensieve.load_tokenizer("base")


def look(model, tokens: tuple[int, ...], selection: Any = "indexer", before: tuple[int, ...] = ()) -> Output:
    """The first output. before: a prompt that ran already, whose pages may be reused."""
    engine = Engine(model, TOKENIZER, SMALL)
    if before:
        engine.add(Request("before", before, Sampling(max_tokens=1)))
        while engine.busy:
            engine.step()
    engine.add(Request("a", tokens, Sampling(max_tokens=2, ignore_eos=True), selection, trace=True))
    outputs: list[Output] = []
    while engine.busy:
        outputs += engine.step()
    assert not any(output.trace for output in outputs[1:]) and engine.scheduler.pool.used == 0
    return outputs[0]


def shares(model, tokens: tuple[int, ...]) -> tuple[list[list[int]], list[torch.Tensor]]:
    """For the last token, by layer: the selected keys, and each head's attention (H, T) to every key, in float64."""
    inputs: dict[int, torch.Tensor] = {}
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    hooks = [a.register_forward_pre_hook(lambda a, args: inputs.__setitem__(a.layer, args[0])) for a in attentions]
    with torch.no_grad():
        out = model(torch.tensor([tokens]), return_selection=True)
    for hook in hooks:
        hook.remove()
    selected = [[i for i in s[0, -1].tolist() if i >= 0] for s in out.selection]
    found = []
    rotation = model.model.rotation(torch.arange(len(tokens)))
    tables = rotation.attention
    for a in attentions:
        h = inputs[a.layer]
        with torch.no_grad():
            q = a.q_b_proj(a.q_a_layernorm(a.q_a_proj(h))).view(len(tokens), a.heads, -1)
            entry = a.kv_a_proj_with_mqa(h)
            c, k_rope = a.kv_a_layernorm(entry[:, : a.latent]), a.rotate(entry[:, None, a.latent :], tables)[:, 0]
            k_nope = a.kv_b_proj(c).view(len(tokens), a.heads, -1)[..., : a.nope]
            q_rope = a.rotate(q[..., a.nope :], tables)[-1]
            logits = torch.einsum("hd,thd->ht", q[-1, :, : a.nope].double(), k_nope.double())
            logits += torch.einsum("hd,td->ht", q_rope.double(), k_rope.double())
        found.append(logits * a.softmax_scale(rotation))
    return selected, found


@pytest.mark.parametrize("length", [5, 200])
def test_it_tells_what_was_read(length: int) -> None:
    model = ours(config("v32"), seed=1)
    tokens = prompt(length)
    selected, logits = shares(model, tokens)
    looks = look(model, tokens).trace
    assert len(looks) == len(selected) == len(logits) > 1
    for seen, chosen, logits_HT in zip(looks, selected, logits, strict=True):
        assert list(seen.selected) == chosen
        read = logits_HT[:, chosen].softmax(-1).mean(0)
        every = logits_HT.softmax(-1).mean(0)
        # float32 against float64 on logits of about one: a few units in the seventh place
        torch.testing.assert_close(torch.tensor(seen.attention).double(), read, atol=2e-6, rtol=1e-5)
        assert seen.kept == pytest.approx(float(every[chosen].sum()), abs=2e-6)
        assert len(seen.dense) == len(chosen) and list(seen.dense) == sorted(seen.dense)
        best = every.topk(len(chosen)).values.sum()
        assert float(every[list(seen.dense)].sum()) == pytest.approx(float(best), abs=1e-6)
        assert sum(seen.dense_attention) == pytest.approx(float(best), abs=2e-6)
    if length == 200:
        assert any(seen.kept < 0.99 for seen in looks)


def test_dense_reads_everything() -> None:
    for model in (ours(config("v32"), seed=1), ours(config("v3"), seed=1)):
        for seen in look(model, prompt(130), "dense").trace:
            assert list(seen.selected) == list(seen.dense) == list(range(130))
            assert seen.kept == pytest.approx(1, abs=1e-5)


def test_found_pages_change_nothing() -> None:
    model = ours(config("v32"), seed=1)
    found = look(model, prompt(200), before=prompt(200)[:150])
    assert found.cached_tokens == 128 and found.trace == look(model, prompt(200)).trace


# over HTTP


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids(client: openai.OpenAI, stream: bool) -> None:  # noqa: F811
    extra = {"return_token_ids": True}
    said = {"model": "sparse", "messages": QUESTION, "temperature": 0, "max_tokens": 12, "extra_body": extra}
    plain = client.chat.completions.create(**(said | {"extra_body": {}}))
    assert not hasattr(plain, "prompt_token_ids") and not hasattr(plain.choices[0], "token_ids")
    if stream:
        chunks = list(client.chat.completions.create(stream=True, **said))
        prompts = [chunk.prompt_token_ids for chunk in chunks if hasattr(chunk, "prompt_token_ids")]
        ids = [id for chunk in chunks for id in getattr(chunk.choices[0], "token_ids", [])]
        assert len(prompts) == 1
    else:
        whole = client.chat.completions.create(**said)
        prompts, ids = [whole.prompt_token_ids], whole.choices[0].token_ids
    assert "Who are you?" in TOKENIZER.decode(prompts[0]) and len(prompts[0]) == plain.usage.prompt_tokens
    assert TOKENIZER.decode(ids) == plain.choices[0].message.content and len(ids) == plain.usage.completion_tokens


def test_lens_over_http(served) -> None:  # noqa: F811
    text = "def f(x):\n    # größer 漢字\n" * 20 + "<|end"
    ids = TOKENIZER(text).input_ids
    for model, layers in (("sparse", 8), ("sparse:dense", 8)):
        answer = httpx.post(served[0] + "/lens", json={"model": model, "token_ids": ids})
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert told["text"] == text and told["context"] == len(told["starts"]) == len(ids)
        pieces = [text[a:b] for a, b in zip(told["starts"], [*told["starts"][1:], None])]
        assert "".join(pieces) == text and "# " not in pieces[0]
        assert [layer["layer"] for layer in told["layers"]] == list(range(layers))
        for layer in told["layers"]:
            assert layer["read"] == len(layer["selected"]) == len(layer["attention"]) == len(layer["dense"])
            assert 0.99 < sum(layer["attention"]) < 1.01 and 0 < layer["kept"] <= 1.001


def test_markers_are_told_from_text() -> None:
    ids = TOKENIZER("<｜User｜>def f(x): return x<｜Assistant｜></think>User").input_ids
    markers = trace.markers_of(TOKENIZER, ids)
    assert [TOKENIZER.decode([ids[i]]) for i in markers] == ["<｜User｜>", "<｜Assistant｜>", "</think>"]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "gone", "token_ids": [5]}, 404, "there is no model 'gone'"),
        ({"model": "sparse", "token_ids": []}, 400, "token_ids"),
        ({"model": "sparse", "token_ids": [10**6]}, 400, "outside of the vocabulary"),
        ({"model": "sparse", "token_ids": [5] * 5000}, 400, "shorten it"),
        ({"model": "sparse", "token_ids": ["a"]}, 400, "token_ids"),
        ({"model": "sparse"}, 400, "token_ids"),
    ],
)
def test_lens_refuses(served, body: Any, status: int, says: str) -> None:  # noqa: F811
    answer = httpx.post(served[0] + "/lens", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == status and says in answer.json()["error"]["message"]


def test_lens_asks_for_the_key(loaded) -> None:  # noqa: F811
    with running(loaded, keys=("secret",)) as (at, _):
        assert httpx.post(at + "/lens", json={"model": "sparse", "token_ids": [5]}).status_code == 401
