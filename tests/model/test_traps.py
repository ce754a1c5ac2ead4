"""The traps that other implementations fell into: each is sprung here on purpose, and our checks must notice."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.models.deepseek_v32.modeling_deepseek_v32 import apply_rotary_pos_emb

import tokensieve
from tests.support.models import SHAPE, YARN, config, difference, index_of, ours, pair, theirs, tokens
from tokensieve.model import DecoderForCausalLM, LatentCache, SelectionContext
from tokensieve.model import indexer as indexer_file
from tokensieve.model.mla import LatentAttention
from tokensieve.model.rope import Tables, frequencies, rotate_half_split, rotate_interleaved, tables
from tokensieve.model.selection import indexer

K, LENGTH = 16, 96
FAR = 0.1  # a thousand times the tolerance of parity


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    folder = tmp_path_factory.mktemp("traps")
    oracle, _ = pair(config("v32", index_topk=K, rope_parameters=YARN | {"mscale_all_dim": 0.7}), folder, seed=3)
    return oracle, folder


@pytest.fixture
def both(saved: tuple[PreTrainedModel, Path]) -> Iterator[tuple[PreTrainedModel, DecoderForCausalLM]]:
    """The oracle and a fresh model of ours, which a test may break."""
    with torch.no_grad():
        yield saved[0], tokensieve.load(saved[1])


def error(both: tuple[PreTrainedModel, DecoderForCausalLM], length: int = LENGTH) -> float:
    oracle, model = both
    ids = tokens(1, length)
    return difference(model(ids).logits, oracle(ids).logits)


def selected(model: DecoderForCausalLM) -> Tensor:
    return model(tokens(1, LENGTH), return_selection=True).selection[0]


# 1 and 2: what is rotated how, and what the indexer reads


def test_a_swapped_rope_layout_of_mla_is_noticed(both: Any) -> None:
    assert error(both) < 1e-4 and error(both, K) < 1e-4
    for layer in both[1].model.layers:
        assert layer.self_attn.rotate is rotate_interleaved
        layer.self_attn.rotate = rotate_half_split
    assert error(both) > FAR and error(both, K) > FAR


def test_a_swapped_rope_layout_of_the_indexer_is_noticed(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = selected(both[1])
    monkeypatch.setattr(indexer_file, "rotate_half_split", rotate_interleaved)
    assert not torch.equal(selected(both[1]), right)
    assert error(both) > FAR
    assert error(both, K) < 1e-4  # up to k tokens nothing is tested: parity has to look beyond


def test_the_unnormalized_query_latent_is_noticed(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = selected(both[1])
    for layer in both[1].model.layers:
        attention = layer.self_attn
        queries = attention.indexer.queries

        def raw(source: Tensor, h: Tensor, tables: Tables, queries: Any = queries, a: Any = attention) -> Any:
            return queries(a.q_a_proj(h), h, tables)

        monkeypatch.setattr(attention.indexer, "queries", raw)
    # The norm's division scales all scores of a query alike and changes no selection; its weights do.
    assert not torch.equal(selected(both[1]), right)
    assert error(both) > FAR


def test_an_indexer_without_yarn_is_noticed(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = selected(both[1])
    inverse, factor = frequencies({"rope_theta": 10000.0}, SHAPE["qk_rope_head_dim"], 1024)
    plain = tables(torch.arange(LENGTH), inverse, factor, interleaved=False)
    monkeypatch.setattr(indexer_file, "rotate_half_split", lambda x, _: rotate_half_split(x, plain))
    assert not torch.equal(selected(both[1]), right)
    assert error(both) > FAR


def contexts(model: DecoderForCausalLM, ids: Tensor) -> list[SelectionContext]:
    seen: list[SelectionContext] = []
    with tokensieve.selecting(model, lambda c: (seen.append(c), indexer(c))[1]):
        model(ids)
    return seen


@pytest.mark.parametrize("latent", [32, None])
@torch.no_grad()
def test_scores_are_equation_1_without_the_softmax_factor(latent: int | None) -> None:
    """In float64 from the layer's input: a factor on all scores changes no selection, so the scores are looked at."""
    c = config("v32", q_lora_rank=latent, rope_parameters=YARN | {"mscale_all_dim": 0.7})
    model = ours(c, seed=4)
    a = model.model.layers[0].self_attn
    inputs: list[Tensor] = []
    a.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    got = contexts(model, tokens(1, LENGTH))[0].scores().double()

    h = inputs[0].double()
    oracle = theirs(config("v32", rope_parameters=c.rope_parameters))
    cos, sin = (x.double() for x in oracle.model.rotary_emb(h, torch.arange(LENGTH)[None]))

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.double().T

    def rotated(x_NHD: Tensor) -> Tensor:
        first, rest = x_NHD.split([SHAPE["qk_rope_head_dim"], x_NHD.shape[-1] - SHAPE["qk_rope_head_dim"]], dim=-1)
        return torch.cat((apply_rotary_pos_emb(first[None], first[None], cos, sin, 2)[0][0], rest), dim=-1)

    source = h
    if latent is not None:
        x = linear(h, a.q_a_proj.weight)
        source = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * a.q_a_layernorm.weight.double()
    heads, width = c.index_n_heads, c.index_head_dim
    q = rotated(linear(source, a.indexer.wq_b.weight).unflatten(-1, (heads, width)))
    k = linear(h, a.indexer.wk.weight)
    k = (k - k.mean(-1, keepdim=True)) * (k.var(-1, unbiased=False, keepdim=True) + 1e-6).rsqrt()
    k = rotated((k * a.indexer.k_norm.weight.double() + a.indexer.k_norm.bias.double())[:, None])[:, 0]
    w = linear(h, a.indexer.weights_proj.weight) * heads**-0.5 * width**-0.5
    want = torch.einsum("sh,sht->st", w, torch.einsum("shd,td->sht", q, k).relu())
    seen = torch.ones(LENGTH, LENGTH).tril().bool()
    assert difference(got[seen], want[seen]) < 1e-5 * float(want.abs().max())
    mscale = 0.1 * 0.7 * math.log(16.0) + 1.0
    scale = a.softmax_scale(model.model.rotation(torch.arange(4)))
    assert scale == pytest.approx(20**-0.5 * mscale**2, rel=1e-12)


# 12: K and V in decode


class Largest(TorchDispatchMode):
    """The largest number of elements that any operation allocated or viewed."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("family", ["v3", "v32"])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_decode_never_expands_k_and_v(family: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(config(family, num_attention_heads=16, num_key_value_heads=16, num_hidden_layers=2))
    cache = LatentCache(reserve=500)
    ids = tokens(rows, 400)
    calls: list[int] = []
    whole = LatentAttention.per_head
    monkeypatch.setattr(LatentAttention, "per_head", lambda *given, **how: calls.append(1) or whole(*given, **how))
    model(ids, past_key_values=cache, use_cache=True)
    calls.clear()
    with Largest() as largest:
        for _ in range(3):
            model(ids[:, -1:], past_key_values=cache, use_cache=True)
    assert calls == []
    # Neither through the layer nor in any other way: all keys' K or V are heads * 12 or 16 wide, the cache is 32 wide.
    assert largest.elements < rows * 400 * 16 * 12 // 2, largest.elements


# float32 where the published model has it


def test_what_stays_float32_in_a_bfloat16_model(saved: tuple[PreTrainedModel, Path]) -> None:
    model = tokensieve.load(saved[1], dtype=torch.bfloat16)
    wide = {name for name, x in model.state_dict().items() if x.dtype == torch.float32}
    assert wide == {
        f"model.layers.{i}.{name}"
        for i in range(3)
        for name in ("self_attn.indexer.weights_proj.weight", "mlp.gate.e_score_correction_bias")
        if i > 0 or "indexer" in name
    }
    a = model.model.layers[0].self_attn
    inputs: list[Tensor] = []
    a.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        q, k, w = index_of(contexts(model, tokens(1, LENGTH))[0])
        want = inputs[0].double() @ a.indexer.weights_proj.weight.double().T * 32**-0.5 * 16**-0.5
        assert (q.dtype, k.dtype, w.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        assert difference(w, want) < 1e-6  # bfloat16 head weights would be off by 1e-3
        logits = model(tokens(1, K)).logits
        # In the mean: rounding to bfloat16 sends a token to another expert now and then.
        assert logits.dtype == torch.bfloat16
        assert float((logits.float() - saved[0](tokens(1, K)).logits).abs().mean()) < 0.1
        gate = model.model.layers[1].mlp.gate
        x = torch.randn(64, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(0)).bfloat16()
        chosen, weights = gate(x)
        scores = (x.double() @ gate.weight.double().T).sigmoid().gather(1, chosen)
        want = scores / scores.sum(-1, keepdim=True) * gate.scale
        assert weights.dtype == torch.float32 and difference(weights, want) < 1e-5
