"""GLM-5: interleaved indexers, layers that share one selection, and its dense relative GLM-4.7-Flash."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Glm4MoeLiteConfig, GlmMoeDsaConfig

import tokensieve
from tests.support import oracle
from tests.support.models import SHAPE, config, difference, margins, ours, pair, random_config, tokens
from tokensieve import cost
from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Request, Sampling
from tokensieve.engine.runner import Runner, page_bytes
from tokensieve.families import family_of, model_config
from tokensieve.model import DecoderForCausalLM, LatentCache, SelectionContext
from tokensieve.model.selection import indexer

TOLERANCE, CLEAR, LENGTH = 1e-4, 1e-5, 72  # as in test_parity.py
# config.json of GLM-5.2, where it decides what is built
PUBLISHED: dict[str, Any] = {
    "model_type": "glm_moe_dsa", "vocab_size": 154880, "hidden_size": 6144, "intermediate_size": 12288,
    "moe_intermediate_size": 2048, "num_hidden_layers": 78, "first_k_dense_replace": 3, "num_attention_heads": 64,
    "num_key_value_heads": 64, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 1,
    "topk_group": 1, "kv_lora_rank": 512, "q_lora_rank": 2048, "qk_rope_head_dim": 64, "qk_nope_head_dim": 192,
    "v_head_dim": 256, "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 32, "index_topk_freq": 4,
    "index_skip_topk_offset": 3, "index_topk_pattern": None, "indexer_rope_interleave": True, "rope_interleave": True,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"}, "tie_word_embeddings": False,
}  # fmt: skip


def glm(kinds: str = "FSFS", seed: int = 0, **changes: Any) -> DecoderForCausalLM:
    shared = {"index_topk_pattern": kinds, "num_hidden_layers": len(kinds)}
    return ours(config("glm", **shared | changes), seed)


@pytest.mark.parametrize("seed", (0, 1, 3, 4, 5, 8))
@torch.no_grad()
def test_logits_equal_those_of_transformers(seed: int, tmp_path: Path) -> None:
    """Whole, up to k, in chunks, step by step and padded; and both programs open what we save, bit for bit."""
    reference, model = pair(random_config("glm", seed), tmp_path / "theirs", seed)
    assert type(reference).__name__ == "GlmMoeDsaForCausalLM"
    ids = tokens(2, LENGTH, seed)
    want = reference(ids).logits
    with margins(model) as gaps:
        got = model(ids).logits
        assert float(want.abs().max()) > 1.0 and difference(got, want) < TOLERANCE
        short = ids[:, : model.config.index_topk]
        assert difference(model(short).logits, reference(short).logits) < TOLERANCE
        cache, parts = LatentCache(), []
        for a, b in ((0, 40), (40, 41), (41, 42), (42, LENGTH)):
            parts.append(model(ids[:, a:b], past_key_values=cache, use_cache=True).logits)
        assert difference(torch.cat(parts, 1), want) < TOLERANCE
        mask = torch.ones_like(ids)
        mask[0, :17] = 0
        a, b = model(ids, attention_mask=mask).logits, reference(ids, attention_mask=mask).logits
        assert difference(a[mask == 1], b[mask == 1]) < TOLERANCE
    assert min(gaps, default=1.0) > CLEAR, "a choice hangs on rounding: take another seed"
    assert tokensieve.save(model, tmp_path / "ours")[0].startswith("vLLM, SGLang")  # of the small widths alone
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert type(again) is type(reference) and torch.equal(again(ids).logits, want)
    assert torch.equal(tokensieve.load(tmp_path / "ours")(ids).logits, model(ids).logits)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    kinds = "".join(kind[0].upper() for kind in written["indexer_types"])
    assert written["indexer_rope_interleave"] is True
    assert written.get("index_topk_pattern") == (kinds if "S" in kinds else None)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 9])
def test_e4m3_queries_are_rotated_as_the_others(length: int) -> None:
    """What quantized pages are scored with: the same q_I and w, but for the scales that are folded into w."""
    model = glm(index_dtype="fp8", index_head_dim=128)
    layer, h, source = model.model.layers[0].self_attn.indexer, torch.randn(length, 48), torch.randn(length, 32)
    rotation = model.model.rotation(torch.arange(5, 5 + length))
    (q, w), (q8, w8) = (x(source, h, rotation.indexer) for x in (layer.queries, layer.e4m3_queries))
    assert q8.dtype == torch.float8_e4m3fn
    oracle.assert_close(q8.float() * w8.unsqueeze(-1), q * w.unsqueeze(-1), 1e-5, 1e-5)


@torch.no_grad()
def test_a_layer_without_an_indexer_reads_what_the_layer_before_reads() -> None:
    model, ids = glm("FSSF"), tokens(2, LENGTH)
    chosen = model(ids, return_selection=True).selection
    assert torch.equal(chosen[0], chosen[1]) and torch.equal(chosen[0], chosen[2])
    assert not torch.equal(chosen[0], chosen[3])
    assert difference(model(ids, selection=chosen).logits, model(ids).logits) == 0
    assert all(x is None for x in model(ids).selection or ())
    asked: list[int] = []

    def first(c: SelectionContext) -> Tensor:
        asked.append(c.layer)
        return indexer(c)

    with tokensieve.selecting(model, first):
        assert torch.equal(model(ids).logits, model(ids, selection=chosen).logits)
    assert asked == [0, 3]
    with tokensieve.selecting(model, "dense"):
        assert difference(model(ids).logits, model(ids, selection=chosen).logits) > 0.1


@torch.no_grad()
def test_owners_alone_have_index_keys_in_the_caches() -> None:
    model, row = glm("FSSF", vocab_size=4096), tokens(1, 150)[0].tolist()
    cache = LatentCache()
    model(torch.tensor([row]), past_key_values=cache, use_cache=True)
    assert [x is None for x in cache.index_BTD] == [False, True, True, False]
    runner = Runner(model, 8)
    assert [pool.shape[-1] for pool in runner.pools.index] == [16, 0, 0, 16]
    assert runner.pools.bytes == 8 * page_bytes(model)
    assert runner.pools.bytes == 8 * 64 * cost.cache_bytes_per_token(cost.shape_of(model.config), "float32")


@torch.no_grad()
def test_steps_chunks_and_pages_agree() -> None:
    """One row's logits by the whole prompt and on the engine's pages, where a trace sees every layer's keys."""
    model, row = glm("FSSF", vocab_size=4096), tokens(1, 150)[0].tolist()
    for selector in ("indexer", "dense", "window", "oracle"):
        with tokensieve.selecting(model, selector):
            out = model(torch.tensor([row]), return_selection=True)
        traced: dict[int, Tensor | None] = {}
        runner = Runner(model, 8)
        runner.chunk(row[:128], 0, [2, 0, 5], selector)

        def trace(c: SelectionContext, indices: Tensor | None, traced: dict[int, Tensor | None] = traced) -> None:
            traced[c.layer] = indices

        chunk = runner.chunk(row[128:149], 128, [2, 0, 5], selector, trace)
        assert difference(chunk, out.logits[0, 148]) < TOLERANCE, selector
        assert [*traced] == [0, 1, 2, 3]
        if selector != "dense":
            assert all(torch.equal(traced[i], out.selection[i][0, 128:149]) for i in range(4))
        runner.chunk(row[:70], 0, [1, 4], selector)
        pages = runner.step([row[149], row[70]], [150, 71], [[2, 0, 5], [1, 4]], selector)
        assert difference(pages, out.logits[0, [149, 70]]) < TOLERANCE, selector


@torch.no_grad()
def test_the_engine_gives_the_tokens_of_generate() -> None:
    model, ids = glm("FSSF", vocab_size=4096), tokens(1, 100)
    want = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 100:]
    engine = Engine(model, tokensieve.load_tokenizer("base"), EngineConfig(pages=8, chunk=64))
    engine.add(Request("x", tuple(ids[0].tolist()), Sampling(max_tokens=6, ignore_eos=True)))
    got: list[int] = []
    while engine.busy:
        got += [token for output in engine.step() for token in output.tokens]
    assert got == want.tolist()


def test_costs_are_those_of_transformers() -> None:
    for kinds in ("FFF", "FSS", "FFSF"):
        made = config("glm", index_topk_pattern=kinds, num_hidden_layers=len(kinds))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(GlmMoeDsaConfig.from_dict(made.to_dict()))
        numbers = sum(x.numel() for x in model.parameters())
        numbers += sum(x.numel() for name, x in model.named_buffers() if name.endswith("correction_bias"))
        for described in (made, made.to_dict()):
            assert cost.parameters(cost.shape_of(described)).total == numbers, kinds
    every = cost.shape_of(PUBLISHED | {"index_topk_freq": 1})
    shape = cost.shape_of(PUBLISHED)
    assert (every.index_layers, shape.index_layers) == (78, 21)
    assert cost.cache_bytes_per_token(every, "fp8") - cost.cache_bytes_per_token(shape, "fp8") == 57 * 132
    reads = [cost.decode_cache_bytes(x, 100_000, "fp8") for x in (every, shape)]
    assert reads[0] - reads[1] == 57 * 100_000 * 132
    one = 2 * 100_000 * (2048 * 32 * 128 + 6144 * 160) + 100_000 * 100_001 // 2 * 2 * 32 * 129
    assert cost.forward_flops(every, 100_000) - cost.forward_flops(shape, 100_000) == 57 * one
    # A layer that borrows teaches the indexer too, so that warm-up costs the same.
    assert cost.train_flops(every, "warmup", 100_000) == cost.train_flops(shape, "warmup", 100_000)
    linear = 2 * 2 * 100_000 * (2048 * 32 * 128 + 6144 * 160)
    saved = linear + 100_000 * 100_001 // 2 * 2 * 32 * 129
    assert cost.train_flops(every, "adapt", 100_000) - cost.train_flops(shape, "adapt", 100_000) == 57 * saved
    kept = [cost.activation_bytes(x, "adapt", 1, 2, checkpointing=False) for x in (every, shape)]
    assert kept[0] - kept[1] == 57 * (2 * (2 * 33 * 128 + 32) + 4 * 2048)


def test_the_published_shape() -> None:
    made = model_config(PUBLISHED)
    assert [i for i, kind in enumerate(made.indexer_types) if kind == "full"] == [0, 1, 2, *range(6, 78, 4)]
    with torch.device("meta"):
        model = DecoderForCausalLM(made)
    assert sum(x.numel() for x in model.parameters()) + 75 * 256 == cost.parameters(cost.shape_of(PUBLISHED)).total
    assert model.model.layers[2].self_attn.lends and model.model.layers[3].self_attn.borrows


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"indexer_types": ["shared", "full", "full"]}, "'full' for the first, since no layer before it selects"),
        ({"indexer_types": ["full"]}, "indexer_types must be 'full' or 'shared' for each of 3 layers"),
        ({"indexer_types": ["full", "full", "half"]}, "indexer_types must be"),
        ({"index_topk_pattern": "FXS"}, "index_topk_pattern is 'FXS'; it must have a letter a layer, F"),
        ({"indexer_rope_interleave": False}, "indexer_rope_interleave is false, which is not supported"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], complaint: str) -> None:
    raw = SHAPE | {"model_type": "glm_moe_dsa"} | changes
    with pytest.raises(UserError, match=complaint), torch.device("meta"):
        DecoderForCausalLM(model_config(raw))


def test_null_is_the_default_of_the_fields_about_sharing() -> None:
    raw = SHAPE | {"model_type": "glm_moe_dsa", "index_topk_freq": None, "index_skip_topk_offset": None}
    assert model_config(raw).indexer_types == ["full"] * 3
    assert family_of(raw).index_layers(raw) == 3


# GLM-4.7-Flash


@torch.no_grad()
def test_the_dense_relative_becomes_a_glm_5(tmp_path: Path) -> None:
    """Its logits are transformers', and those of the sparse form up to k; transformers opens that as GLM-5."""
    shape = {k: v for k, v in SHAPE.items() if k != "first_k_dense_replace"} | {"n_group": 1, "topk_group": 1}
    dense_config = Glm4MoeLiteConfig(**shape)
    reference, dense = pair(dense_config, tmp_path / "theirs")
    ids = tokens(2, LENGTH)
    assert difference(dense(ids).logits, reference(ids).logits) < TOLERANCE
    counted = sum(x.numel() for x in reference.parameters()) + 2 * 8
    assert cost.parameters(cost.shape_of(dense.config)).total == counted
    assert tokensieve.save(dense, tmp_path / "dense") == []
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["first_k_dense_replace"] == 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert type(again) is type(reference) and torch.equal(again(ids).logits, reference(ids).logits)
    sparse = tokensieve.sparsify(dense, top_k=16, index_heads=32, index_dim=16)
    assert sparse.config.model_type == "glm_moe_dsa" and sparse.config.mlp_layer_types == ["dense", "sparse", "sparse"]
    assert difference(sparse(ids[:, :16]).logits, dense(ids[:, :16]).logits) < TOLERANCE
    tokensieve.save(sparse, tmp_path / "sparse")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    assert type(opened).__name__ == "GlmMoeDsaForCausalLM"
    assert difference(opened(ids).logits, sparse(ids).logits) < TOLERANCE
