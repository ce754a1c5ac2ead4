"""Relatives of DeepSeek-V3 in layout: Kimi-K2 under a name of its own, and Moonlight without a query latent."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3ForCausalLM, PreTrainedModel

import tokensieve
from tests.support.models import SHAPE, config, difference, theirs, tokens
from tests.support.training import OPTIMIZER, batch, indexers, step_gradients
from tokensieve import checkpoint, cost
from tokensieve.config import PhaseConfig, TrainConfig
from tokensieve.families import model_config
from tokensieve.families.kimi import KimiConfig
from tokensieve.model import DecoderForCausalLM

LENGTH, K = 72, 16
CODE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
# config.json of Kimi-K2-Instruct, without its tokens and its quantization
PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": CODE,
    "aux_loss_alpha": 0.001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 131072,
    "model_type": "kimi_k2", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 384,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 64, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "pretraining_tp": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3", "use_cache": True, "v_head_dim": 128, "vocab_size": 163840,
}  # fmt: skip
ROPE = PUBLISHED["rope_scaling"] | {"original_max_position_embeddings": 64}
SMALL = PUBLISHED | SHAPE | {"n_group": 1, "topk_group": 1, "rope_scaling": ROPE}
# config.json of Moonlight-16B-A3B, with the widths of SHAPE
MOONLIGHT = SHAPE | {
    "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.446,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}, "rms_norm_eps": 1e-5, "vocab_size": 320,
    "num_nextn_predict_layers": 0, "auto_map": CODE,
}  # fmt: skip


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """transformers' DeepSeek-V3, and a folder of its tensors as Kimi-K2 is published, with code that must not run."""
    folder = tmp_path_factory.mktemp("kimi") / "published"
    fields = {k: v for k, v in SMALL.items() if k not in ("rope_scaling", "rope_theta", "auto_map", "model_type")}
    oracle = theirs(config("v3", **fields | {"rope_parameters": ROPE | {"rope_theta": 50000.0, "rope_type": "yarn"}}))
    oracle.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(SMALL))
    (folder / "code.py").write_text("raise SystemExit('the code of a folder was run')\n")
    return oracle, folder


@torch.no_grad()
def test_kimi_k2_is_deepseek_v3(kimi: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    oracle, folder = kimi
    model, ids = tokensieve.load(folder), tokens(2, LENGTH)
    want = oracle(ids).logits
    assert type(model.config) is KimiConfig and difference(model(ids).logits, want) < 1e-4
    reasons = tokensieve.save(model, tmp_path / "dense")
    assert reasons[0].startswith("transformers, vLLM, SGLang: they know kimi_k2 by the code of the published folder")
    written = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert written["model_type"] == "kimi_k2" and "auto_map" not in written
    again = tokensieve.load(tmp_path / "dense")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    (tmp_path / "dense" / "config.json").write_text(json.dumps(written | {"model_type": "deepseek_v3"}))  # the remedy
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert type(opened) is DeepseekV3ForCausalLM and torch.equal(opened(ids).logits, want)


@torch.no_grad()
def test_the_auto_classes_open_kimi_k2_in_our_class(kimi: tuple[PreTrainedModel, Path]) -> None:
    oracle, folder = kimi
    for trusted in (None, False, True):  # whoever trusts it: the folder's code stays unread
        assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trusted)) is KimiConfig
        options = {"dtype": torch.float32, "trust_remote_code": trusted, "attn_implementation": "sdpa"}
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        assert isinstance(model, DecoderForCausalLM)
        assert difference(model(tokens(2, 30)).logits, oracle(tokens(2, 30)).logits) < 1e-4


@torch.no_grad()
def test_a_sparse_kimi_k2_is_a_deepseek_v32(kimi: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, ids = tokensieve.load(kimi[1]), tokens(2, LENGTH)
    sparse = tokensieve.sparsify(model, top_k=K, index_heads=32, index_dim=16)
    assert sparse.config.model_type == "deepseek_v32"
    assert difference(sparse(ids[:, :K]).logits, model(ids[:, :K]).logits) < 1e-4
    assert not any(reason.startswith("transformers") for reason in tokensieve.save(sparse, tmp_path))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(opened).__name__ == "DeepseekV32ForCausalLM"
    assert difference(opened(ids).logits, sparse(ids).logits) < 1e-4


def test_the_published_kimi_k2_has_a_trillion_parameters() -> None:
    made = model_config(PUBLISHED)
    with torch.device("meta"):
        model = DecoderForCausalLM(made)
    total = sum(x.numel() for x in model.parameters()) + 60 * 384  # the router's bias is a buffer
    assert total == cost.parameters(cost.shape_of(PUBLISHED)).total
    assert 1.02e12 < total < 1.03e12
    counted = checkpoint.expected_tensors(made)
    assert sum(torch.Size(shape).numel() for shape in counted.values()) == total


def test_moonlight_from_its_folder_to_a_sparse_one(tmp_path: Path) -> None:
    """No query latent: index queries are made of the layer's normalized input, and no other program can open that."""
    oracle = theirs(config("v3", **{k: v for k, v in MOONLIGHT.items() if k != "auto_map"}))
    oracle.save_pretrained(tmp_path / "theirs")
    raw = json.loads((tmp_path / "theirs" / "config.json").read_text()) | {"auto_map": CODE}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(raw))
    dense, ids = tokensieve.load(tmp_path / "theirs"), tokens(2, LENGTH)
    with torch.no_grad():
        assert difference(dense(ids).logits, oracle(ids).logits) < 1e-4
    assert cost.parameters(cost.shape_of(raw)).total == sum(x.numel() for x in dense.parameters()) + 2 * 8
    assert tokensieve.save(dense, tmp_path / "dense") == []
    model = tokensieve.sparsify(dense, top_k=K, index_heads=8, index_dim=16)
    assert model.model.layers[0].self_attn.indexer.wq_b.in_features == 48
    seen: list[Tensor] = []
    layer = model.model.layers[1]
    layer.input_layernorm.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    layer.self_attn.indexer.wq_b.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        assert difference(model(ids[:, :K]).logits, dense(ids[:, :K]).logits) < 1e-4
        seen.clear()
        model(ids)
    assert torch.equal(seen[0], seen[1])
    for stage in ("warmup", "adapt"):
        settings = TrainConfig(stage, "", "", (PhaseConfig(1, 48, 4, 4),), optimizer=OPTIMIZER, device="cpu")
        gradients, figures = step_gradients(settings, model, [batch(4, 48)])
        assert indexers(gradients) and figures["kl"] > 0
        assert (gradients.keys() == indexers(gradients).keys()) == (stage == "warmup")
    reasons = tokensieve.save(model, tmp_path / "sparse")
    assert "the indexer reads the query latent, and this model has none" in reasons[0]
    assert reasons[0].startswith("transformers, vLLM, SGLang: ")
    again = tokensieve.load(tmp_path / "sparse")
    assert again.config.q_lora_rank is None and again.config.model_type == "deepseek_v32"
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
