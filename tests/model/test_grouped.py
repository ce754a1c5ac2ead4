"""Grouped-query attention: each family dense against transformers' own class, and the whole road of its sparse form."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

import tokensieve
from tests.support.grouped import DENSE, GIVEN, LLAMA3, QWEN, ROPES, K, config, random_config
from tests.support.models import difference, margins, ours, pair, tokens
from tests.support.training import OPTIMIZER, batch, indexers, step_gradients
from tokensieve.config import PhaseConfig, TrainConfig
from tokensieve.engine import Engine, EngineConfig, Request, Sampling
from tokensieve.engine.runner import Runner
from tokensieve.families import family_of
from tokensieve.model import DecoderForCausalLM, ForwardOptions, LatentCache, SelectionContext, model_path, with_options
from tokensieve.model.grouped import GroupedAttention
from tokensieve.model.rope import frequencies
from tokensieve.model.selection import indexer

LENGTH = 90
TOLERANCE = 1e-4  # of logits of about 4, float32, summed in another order
families = pytest.mark.parametrize("kind", DENSE)


@families
@pytest.mark.parametrize("seed", range(len(ROPES)))
@torch.no_grad()
def test_dense_logits_equal_those_of_transformers(kind: str, seed: int, tmp_path: Path) -> None:
    """Whole, in chunks, step by step, padded and packed; and the folder comes back bit for bit."""
    oracle, model = pair(random_config(kind, seed), tmp_path / "theirs", seed)
    ids = tokens(2, LENGTH, seed)
    want = oracle(ids).logits
    assert 1.0 < float(want.abs().max()) < 12.0
    with margins(model) as gaps:
        assert difference(model(ids).logits, want) < TOLERANCE
        cache, parts = LatentCache(), []
        for a, b in ((0, 40), (40, 41), (41, 42), (42, LENGTH)):
            parts.append(model(ids[:, a:b], past_key_values=cache, use_cache=True).logits)
        assert difference(torch.cat(parts, 1), want) < TOLERANCE
        mask = torch.ones_like(ids)
        mask[0, :17] = 0
        padded = model(ids, attention_mask=mask).logits, oracle(ids, attention_mask=mask).logits
        assert difference(padded[0][0, 17:], padded[1][0, 17:]) < TOLERANCE
        assert difference(padded[0][1], want[1]) < TOLERANCE
        positions = torch.cat((torch.arange(30), torch.arange(LENGTH - 30))).expand(2, -1)
        packed = model(ids, position_ids=positions).logits
        assert difference(packed[:, :30], oracle(ids[:, :30]).logits) < TOLERANCE
        assert difference(packed[:, 30:], oracle(ids[:, 30:]).logits) < TOLERANCE
    assert min(gaps, default=1.0) > 1e-6, "a choice of experts hangs on rounding: take another seed"
    tokensieve.save(model, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert type(again) is type(oracle) and again.state_dict().keys() == oracle.state_dict().keys()
    assert all(torch.equal(x, oracle.state_dict()[n]) for n, x in again.state_dict().items())
    assert torch.equal(again(ids).logits, want)


@families
def test_the_drawn_configs_are_many_kinds(kind: str) -> None:
    """Chance decides what a seed draws, so it is checked once."""
    drawn = [random_config(kind, seed) for seed in range(len(ROPES))]
    kinds: dict[str, set[Any]] = {
        "groups": {c.num_key_value_heads for c in drawn},
        "heads of another width than hidden_size / heads": {
            family_of(c).width(vars(c)) * c.num_attention_heads == c.hidden_size for c in drawn
        },
        "tied": {c.tie_word_embeddings for c in drawn},
        "layers": {c.num_hidden_layers for c in drawn},
    }
    if "attention_bias" in vars(drawn[0]):
        kinds["bias"] = {c.attention_bias for c in drawn}
    if kind == "qwen3_moe":
        kinds["normalized"] = {c.norm_topk_prob for c in drawn}
        kinds["dense layers"] = {family_of(c).moe_layers(vars(c)) == c.num_hidden_layers for c in drawn}
    assert {name: len(values) for name, values in kinds.items() if len(values) < 2} == {}


@families
@torch.no_grad()
def test_a_wrong_rotation_or_a_missing_norm_is_noticed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pairs of neighbours in place of halves, or without a norm of the heads, logits are far from theirs."""
    oracle, model = pair(config(kind), tmp_path)
    ids = tokens(1, LENGTH)
    want = oracle(ids).logits
    assert difference(model(ids).logits, want) < TOLERANCE
    for layer in model.modules():
        for name in ("q_norm", "k_norm") if isinstance(layer, GroupedAttention) and layer.q_norm is not None else ():
            norm = getattr(layer, name)
            setattr(layer, name, torch.nn.Identity())
            assert difference(model(ids).logits, want) > 0.05, name
            setattr(layer, name, norm)
    assert difference(model(ids).logits, want) < TOLERANCE

    def by_neighbours(x: Tensor, tables: Any) -> Tensor:
        halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return rotate(halves, tables).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)

    from tokensieve.model import grouped

    rotate = grouped.rotate_half_split
    monkeypatch.setattr(grouped, "rotate_half_split", by_neighbours)
    assert difference(model(ids).logits, want) > 0.1


def sparse(kind: str, seed: int = 0, **changes: Any) -> DecoderForCausalLM:
    return ours(config(f"{kind}_dsa", **changes), seed)


def dense_of(model: DecoderForCausalLM, kind: str, **changes: Any) -> DecoderForCausalLM:
    """The dense model with the same tensors."""
    dense = ours(config(kind, **changes))
    dense.load_state_dict({n: x for n, x in model.state_dict().items() if ".indexer." not in n})
    return dense


def rotated(x_NHD: Tensor, inverse: Tensor, factor: float = 1.0) -> Tensor:
    """Halves of the last axis as pairs, in float64, at positions 0, 1, ..."""
    angle = torch.arange(len(x_NHD)).double()[:, None] * inverse.double()
    cos, sin = (factor * torch.cat((x, x), -1)[:, None] for x in (angle.cos(), angle.sin()))
    a, b = x_NHD.chunk(2, -1)
    return x_NHD * cos + torch.cat((-b, a), -1) * sin


def attention_of(layer: Any, h: Tensor, chosen: Tensor, inverse: Tensor, factor: float) -> Tensor:
    """One layer's attention over given sets of keys, naively, in float64."""
    h, (heads, groups, width) = h.double(), (6, 2, 16)

    def linear(name: str, x: Tensor = h) -> Tensor:
        module = getattr(layer, name)
        return F.linear(x, module.weight.double(), None if module.bias is None else module.bias.double())

    def normed(x: Tensor, norm: Any) -> Tensor:
        return x if norm is None else x * (x.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()

    q, k, v = (linear(name).view(len(h), -1, width) for name in ("q_proj", "k_proj", "v_proj"))
    q, k = (rotated(normed(x, n), inverse, factor) for x, n in ((q, layer.q_norm), (k, layer.k_norm)))
    k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    scores = torch.einsum("nhd,thd->nht", q, k) * width**-0.5
    seen = torch.zeros(len(h), len(h) + 1, dtype=torch.bool).scatter_(
        1, (chosen.long() + len(h) + 1) % (len(h) + 1), True
    )
    p = scores.masked_fill(~seen[:, None, : len(h)], -torch.inf).softmax(-1)
    return linear("o_proj", torch.einsum("nht,thd->nhd", p, v).flatten(1))


@families
@pytest.mark.parametrize("rope", [LLAMA3, GIVEN], ids=["llama3", "yarn"])
@torch.no_grad()
def test_sparse_attention_is_that_over_the_selected_keys(kind: str, rope: dict[str, Any]) -> None:
    """Every group reads the same set; in both forms, against float64."""
    biased = {"attention_bias": True} if kind == "qwen3" else {}
    model, ids = sparse(kind, rope_parameters=rope, **biased), tokens(1, LENGTH)
    layer = model.model.layers[0].self_attn
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda _, args, out: (inputs.append(args[0]), outputs.append(out[0]), None)[2])
    for form in ("masked", "gathered"):
        with with_options(model, ForwardOptions(form=form)):
            chosen = model(ids, return_selection=True).selection[0][0]
        assert chosen.shape == (LENGTH, K)
        want = attention_of(layer, inputs[-1], chosen, *frequencies(rope, 16, 1024))
        assert difference(outputs[-1].double(), want) < 1e-5, form


@families
@pytest.mark.parametrize("dims", [8, 16])
@pytest.mark.parametrize("rope", [LLAMA3, QWEN], ids=["llama3", "yarn"])
@torch.no_grad()
def test_the_indexer_shares_the_frequencies_over_its_own_width(kind: str, rope: dict[str, Any], dims: int) -> None:
    """Scores of equation (1) on the layer's normalized input, half-split, without YaRN's factor on cos and sin.

    The rotated dims are half of an index head, or as many as those of the attention.
    """
    model, ids = sparse(kind, rope_parameters=rope, index_rope_head_dim=dims), tokens(1, LENGTH)
    layer = model.model.layers[0].self_attn
    inputs: list[Tensor] = []
    scores: list[Tensor] = []
    layer.register_forward_hook(lambda _, args, out: inputs.append(args[0]))

    def keep(c: SelectionContext) -> Tensor:
        scores.append(c.scores())
        return indexer(c)

    with tokensieve.selecting(model, keep):
        model(ids)
    h, part = inputs[0].double(), layer.indexer
    q = F.linear(h, part.wq_b.weight.double()).view(LENGTH, 8, 16)
    norm = part.k_norm
    k = F.layer_norm(F.linear(h, part.wk.weight.double()), (16,), norm.weight.double(), norm.bias.double(), 1e-6)
    inverse, factor = frequencies(rope, dims, 1024)
    assert (factor > 1.1) == (rope is QWEN)
    q, k = (torch.cat((rotated(x[..., :dims], inverse), x[..., dims:]), -1) for x in (q, k[:, None]))
    w = F.linear(h, part.weights_proj.weight.double()) * 8**-0.5 * 16**-0.5
    want = torch.einsum("nh,nht->nt", w, torch.einsum("nhd,td->nht", q, k[:, 0]).relu())
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    assert difference(scores[0][visible].double(), want[visible]) < 1e-4


@families
@torch.no_grad()
def test_up_to_k_tokens_sparse_is_dense(kind: str) -> None:
    """With k tokens, with a larger k, and on padded and packed rows."""
    model = sparse(kind, rope_parameters=QWEN)
    dense = dense_of(model, kind, rope_parameters=QWEN)
    ids = tokens(2, LENGTH)
    want = dense(ids).logits
    assert difference(model(ids[:, :K]).logits, want[:, :K]) < TOLERANCE
    assert difference(model(ids).logits, want) > 0.1
    with tokensieve.selecting(model, "dense"):
        assert difference(model(ids).logits, want) < TOLERANCE
    positions = torch.cat((torch.arange(30), torch.arange(LENGTH - 30))).expand(2, -1)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    for given in ({}, {"position_ids": positions}, {"attention_mask": mask}):
        want = dense(ids, **given).logits
        for form in ("masked", "gathered"):
            with with_options(model, ForwardOptions(form=form, top_k=LENGTH)):
                got = model(ids, **given).logits
            assert difference(got[mask == 1], want[mask == 1]) < TOLERANCE, (form, given)


@families
@torch.no_grad()
def test_rows_are_independent_of_padding_and_of_their_neighbours(kind: str) -> None:
    """Sparse: a left-padded row and a packed document have the logits that they have alone."""
    model, ids = sparse(kind, rope_parameters=LLAMA3), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    padded = model(ids, attention_mask=mask).logits
    assert difference(padded[0, 17:], model(ids[:1, 17:]).logits[0]) < TOLERANCE
    assert difference(padded[1], model(ids[1:]).logits[0]) < TOLERANCE
    positions = torch.cat((torch.arange(30), torch.arange(LENGTH - 30))).expand(2, -1)
    packed = model(ids, position_ids=positions).logits
    assert difference(packed[:, :30], model(ids[:, :30]).logits) < TOLERANCE
    assert difference(packed[:, 30:], model(ids[:, 30:]).logits) < TOLERANCE


@families
@torch.no_grad()
def test_steps_chunks_and_pages_agree(kind: str) -> None:
    """One row's logits by the whole prompt, a cache, and the engine's pages, sparse and dense."""
    model, row = sparse(kind, vocab_size=4096, rope_parameters=LLAMA3), tokens(1, 150)[0].tolist()
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


@families
def test_from_dense_to_an_answer(kind: str, tmp_path: Path) -> None:
    """Sparsify, one warm-up step, one adaptation step, saved and opened, and answers of the engine are those of
    generate.
    """
    dense = ours(config(kind, vocab_size=4096, rope_parameters=LLAMA3, tie_word_embeddings=True))
    dense.folder = model_path("base")  # so that its tokenizer goes with the model
    model = tokensieve.sparsify(dense, top_k=K, index_heads=8, index_dim=16)
    assert model.config.model_type == f"{kind}_dsa" and model.is_sparse and not dense.is_sparse
    assert model.config.index_rope_head_dim == 16
    before = {n: x.clone() for n, x in model.state_dict().items()}
    for stage in ("warmup", "adapt"):
        settings = TrainConfig(stage, "", "", (PhaseConfig(1, 48, 4, 4),), optimizer=OPTIMIZER, device="cpu")
        gradients, figures = step_gradients(settings, model, [batch(4, 48)])
        assert indexers(gradients) and figures["kl"] > 0
        assert (gradients.keys() == indexers(gradients).keys()) == (stage == "warmup")
        with torch.no_grad():
            for name, gradient in gradients.items():
                model.get_parameter(name).sub_(1e-2 * gradient)
    learners = {name: x for name, x in model.named_parameters() if not name.endswith("lm_head.weight")}
    assert all(not torch.equal(x, before[n]) for n, x in learners.items()), "a parameter had no gradient"
    reasons = tokensieve.save(model, tmp_path / "sparse")
    assert "no grouped-query attention with an indexer" in reasons[0]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    assert type(again) is DecoderForCausalLM
    loaded = tokensieve.load(tmp_path / "sparse").config.to_dict()
    assert again.config.to_dict() | {"_name_or_path": ""} == loaded
    assert again.config.model_type == f"{kind}_dsa" and again.config.index_topk == K
    state = again.state_dict()
    assert all(torch.equal(x, state[n]) for n, x in model.state_dict().items())
    ids = tokens(1, 100)
    with torch.no_grad():
        want = again.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 100:]
    engine = Engine(again, tokensieve.load_tokenizer(tmp_path / "sparse"), EngineConfig(pages=8, chunk=64))
    engine.add(Request("x", tuple(ids[0].tolist()), Sampling(max_tokens=6, ignore_eos=True)))
    got: list[int] = []
    while engine.busy:
        got += [token for output in engine.step() for token in output.tokens]
    assert got == want.tolist()
