"""Grouped-query attention: `llama`, dense against transformers' own class, and the whole road of its sparse form."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tokensieve
from tests.support.models import ROPES, difference, ours, randomize, tokens
from tests.support.training import OPTIMIZER, batch, indexers, step_gradients
from tokensieve.config import PhaseConfig, TrainConfig, UserError
from tokensieve.cost import parameters, shape_of
from tokensieve.engine import Engine, EngineConfig, Request, Sampling
from tokensieve.engine.runner import Runner
from tokensieve.families import SparseLlamaConfig
from tokensieve.model import ForwardOptions, LatentCache, with_options

K, LENGTH = 16, 90
TOLERANCE = 1e-4  # of logits of about 4, float32, summed in another order
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}
UNTRUNCATED = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 128,
    "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": False,
}  # fmt: skip
INDEXER = {"index_topk": K, "index_n_heads": 8, "index_head_dim": 16, "index_rope_head_dim": 8}


def random_config(seed: int) -> LlamaConfig:
    draw = random.Random(seed)
    heads, groups = draw.choice([(4, 1), (4, 2), (6, 3), (5, 5), (8, 2)])
    width = draw.choice([8, 16, 24])
    return LlamaConfig(
        **SHAPE
        | {
            "hidden_size": heads * draw.choice([8, 10, 16]),
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": width,
            "num_hidden_layers": draw.choice([1, 2, 3]),
            "attention_bias": draw.random() < 0.4,
            "mlp_bias": draw.random() < 0.4,
            "tie_word_embeddings": draw.random() < 0.4,
            "rms_norm_eps": draw.choice([1e-6, 1e-5]),
            "rope_parameters": [ROPES[0], ROPES[4], ROPES[5], UNTRUNCATED][seed % 4],
        }
    )


@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_dense_logits_equal_those_of_transformers(seed: int, tmp_path: Path) -> None:
    """Whole, in chunks, step by step, padded and packed; and the folder comes back bit for bit."""
    oracle = randomize(LlamaForCausalLM(random_config(seed)), seed)
    oracle.save_pretrained(tmp_path / "theirs")
    model = tokensieve.load(tmp_path / "theirs")
    ids = tokens(2, LENGTH, seed)
    want = oracle(ids).logits
    assert difference(model(ids).logits, want) < TOLERANCE
    cache, parts = LatentCache(), []
    for a, b in ((0, 40), (40, 41), (41, 42), (42, LENGTH)):
        parts.append(model(ids[:, a:b], past_key_values=cache, use_cache=True).logits)
    assert difference(torch.cat(parts, 1), want) < TOLERANCE
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    padded = model(ids, attention_mask=mask).logits, oracle(ids, attention_mask=mask).logits
    assert difference(padded[0][0, 17:], padded[1][0, 17:]) < TOLERANCE
    positions = torch.cat((torch.arange(30), torch.arange(LENGTH - 30))).expand(2, -1)
    packed = model(ids, position_ids=positions).logits
    assert difference(packed[:, :30], oracle(ids[:, :30]).logits) < TOLERANCE
    assert difference(packed[:, 30:], oracle(ids[:, 30:]).logits) < TOLERANCE
    tokensieve.save(model, tmp_path / "ours")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert all(torch.equal(x, oracle.state_dict()[n]) for n, x in again.state_dict().items())
    assert torch.equal(again(ids).logits, want)


def sparse(seed: int = 0, **changes: Any) -> Any:
    return ours(SparseLlamaConfig(**SHAPE | INDEXER | changes), seed)


def attention_of(layer: Any, h: Tensor, chosen: Tensor, positions: Tensor) -> Tensor:
    """One layer's attention over given sets of keys, naively, in float64."""
    h = h.double()
    heads, groups, width = 6, 2, 16
    angle = positions.double()[:, None] / 10000.0 ** (torch.arange(0, width, 2).double() / width)
    cos, sin = (torch.cat((x, x), -1)[:, None] for x in (angle.cos(), angle.sin()))

    def rotated(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    def linear(name: str) -> Tensor:
        return h @ getattr(layer, name).weight.double().T

    q, k = (rotated(linear(name).view(len(h), -1, width)) for name in ("q_proj", "k_proj"))
    v = linear("v_proj").view(len(h), groups, width)
    k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    scores = torch.einsum("nhd,thd->nht", q, k) * width**-0.5
    seen = torch.zeros(len(h), len(h) + 1, dtype=torch.bool).scatter_(
        1, (chosen.long() + len(h) + 1) % (len(h) + 1), True
    )
    p = scores.masked_fill(~seen[:, None, : len(h)], -torch.inf).softmax(-1)
    return torch.einsum("nht,thd->nhd", p, v).flatten(1) @ layer.o_proj.weight.double().T


@torch.no_grad()
def test_sparse_attention_is_that_over_the_selected_keys() -> None:
    """Every group reads the same set; in both forms, against float64."""
    model, ids = sparse(), tokens(1, LENGTH)
    layer = model.model.layers[0].self_attn
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda _, args, out: (inputs.append(args[0]), outputs.append(out[0]), None)[2])
    for form in ("masked", "gathered"):
        with with_options(model, ForwardOptions(form=form)):
            chosen = model(ids, return_selection=True).selection[0][0]
        assert chosen.shape == (LENGTH, K)
        want = attention_of(layer, inputs[-1], chosen, torch.arange(LENGTH))
        assert difference(outputs[-1].double(), want) < 1e-5, form


@torch.no_grad()
def test_up_to_k_tokens_sparse_is_dense(tmp_path: Path) -> None:
    model = sparse()
    dense = ours(LlamaConfig(**SHAPE))
    dense.load_state_dict({n: x for n, x in model.state_dict().items() if ".indexer." not in n})
    ids = tokens(1, LENGTH)
    assert difference(model(ids[:, :K]).logits, dense(ids[:, :K]).logits) < TOLERANCE
    assert difference(model(ids).logits, dense(ids).logits) > 0.1
    with tokensieve.selecting(model, "dense"):
        assert difference(model(ids).logits, dense(ids).logits) < TOLERANCE


@torch.no_grad()
def test_steps_chunks_and_pages_agree() -> None:
    """One row's logits by the whole prompt, a cache, and the engine's pages, sparse and dense."""
    model, row = sparse(vocab_size=4096), tokens(1, 150)[0].tolist()
    for selector in ("indexer", "dense", "window", "oracle"):
        with tokensieve.selecting(model, selector):
            want = model(torch.tensor([row])).logits[0]
            cache = LatentCache()
            model(torch.tensor([row[:-1]]), past_key_values=cache, use_cache=True)
            step = model(torch.tensor([row[-1:]]), past_key_values=cache, use_cache=True).logits[0, 0]
        assert difference(step, want[-1]) < TOLERANCE, selector
        runner = Runner(model, 8)
        assert runner.pools.entries[0].shape == (8, 64, 2, 32)
        runner.chunk(row[:128], 0, [2, 0, 5], selector)
        chunk = runner.chunk(row[128:149], 128, [2, 0, 5], selector)
        assert difference(chunk, want[148]) < TOLERANCE, selector
        runner.chunk(row[:70], 0, [1, 4], selector)
        pages = runner.step([row[149], row[70]], [150, 71], [[2, 0, 5], [1, 4]], selector)
        assert difference(pages[0], want[149]) < TOLERANCE and difference(pages[1], want[70]) < TOLERANCE, selector


def test_from_dense_to_an_answer(tmp_path: Path) -> None:
    """Sparsify, one warm-up step, one adaptation step, saved and opened, and answers of the engine are those of
    generate.
    """
    dense = ours(LlamaConfig(**SHAPE | {"vocab_size": 4096}))
    model = tokensieve.sparsify(dense, top_k=K, index_heads=8, index_dim=16)
    assert model.config.model_type == "llama_dsa" and model.is_sparse and not dense.is_sparse
    before = {n: x.clone() for n, x in model.state_dict().items()}
    for stage in ("warmup", "adapt"):
        settings = TrainConfig(stage, "", "", (PhaseConfig(1, 48, 4, 4),), optimizer=OPTIMIZER, device="cpu")
        gradients, figures = step_gradients(settings, model, [batch(4, 48)])
        assert indexers(gradients) and figures["kl"] > 0
        assert (gradients.keys() == indexers(gradients).keys()) == (stage == "warmup")
        with torch.no_grad():
            for name, gradient in gradients.items():
                model.get_parameter(name).sub_(1e-2 * gradient)
    assert all(not torch.equal(x, before[n]) for n, x in model.state_dict().items() if n.endswith("wq_b.weight"))
    reasons = tokensieve.save(model, tmp_path / "sparse")
    assert "no grouped-query attention with an indexer" in reasons[0]
    again = tokensieve.load(tmp_path / "sparse")
    assert again.config.model_type == "llama_dsa"
    assert all(torch.equal(x, again.state_dict()[n]) for n, x in model.state_dict().items())
    ids = tokens(1, 100)
    with torch.no_grad():
        want = again.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 100:]
    engine = Engine(again, tokensieve.load_tokenizer("base"), EngineConfig(pages=8, chunk=64))
    engine.add(Request("x", tuple(ids[0].tolist()), Sampling(max_tokens=6, ignore_eos=True)))
    got: list[int] = []
    while engine.busy:
        got += [token for output in engine.step() for token in output.tokens]
    assert got == want.tolist()


def test_costs_are_counted() -> None:
    for model in (sparse(), ours(LlamaConfig(**SHAPE | {"tie_word_embeddings": True}))):
        count = sum(p.numel() for p in model.parameters())
        assert parameters(shape_of(model.config)).total == count
        assert parameters(shape_of(model.config.to_dict())).total == count


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, "6 attention heads cannot share 4 num_key_value_heads"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}, "rope type 'llama3' is not supported"),
    ],
)  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ours(LlamaConfig(**SHAPE | changes))
