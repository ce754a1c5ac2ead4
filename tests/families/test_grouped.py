"""What the families with grouped keys and values accept, refuse, write and count."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tokensieve
from tests.support.grouped import DENSE, SHAPE, config, random_config
from tests.support.models import ours, theirs, tokens
from tokensieve import checkpoint
from tokensieve.config import UserError
from tokensieve.cost import parameters, shape_of
from tokensieve.families import FAMILIES, family_of, model_config
from tokensieve.model import DecoderForCausalLM

# The fields of published config.json files that sizes depend on; parameters in all, and those that a token uses.
LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072,
    "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False, "rope_theta": 1000000.0,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960, "max_window_layers": 36, "sliding_window": None, "use_sliding_window": False,
    "rope_theta": 1000000, "rope_scaling": None, "attention_bias": False,
}  # fmt: skip
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "sliding_window": None, "rope_theta": 1000000.0,
}  # fmt: skip
PUBLISHED = {
    "Llama-3.1-8B": (LLAMA, 8_030_261_248, 8.03e9),
    "Qwen2.5-7B": (QWEN2, 7_615_616_512, 7.62e9),
    "Qwen3-8B": (QWEN3, 8_190_735_360, 8.19e9),
    "Qwen3-30B-A3B": (QWEN3_MOE, 30_532_122_624, 3.35e9),
    "Mistral-7B-v0.3": (MISTRAL, 7_248_023_552, 7.25e9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name: str) -> None:
    raw, total, active = PUBLISHED[name]
    raw = raw | {"tie_word_embeddings": False, "hidden_act": "silu"}
    built = model_config(raw)
    with torch.device("meta"):
        model = DecoderForCausalLM(built)
    assert sum(p.numel() for p in model.parameters()) == total
    for counted in (parameters(shape_of(raw)), parameters(shape_of(built))):
        assert counted.total == total and counted.active == pytest.approx(active, rel=2e-3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", DENSE)
def test_tensors_and_costs_are_those_of_transformers(kind: str, seed: int, tmp_path: Path) -> None:
    """By name and shape on disk, and by number: dense, and sparse with the indexers besides."""
    dense = random_config(kind, seed)
    oracle = theirs(dense, seed)
    oracle.save_pretrained(tmp_path)
    on_disk = checkpoint.open_shards(tmp_path).shape
    assert checkpoint.expected_tensors(dense) == on_disk
    count = oracle.num_parameters()
    assert parameters(shape_of(dense)).total == count == sum(math.prod(shape) for shape in on_disk.values())
    for raw in (dense.to_dict(), checkpoint.read_config(tmp_path)):
        assert parameters(shape_of(raw)).total == count
    sparse = tokensieve.sparsify(tokensieve.load(tmp_path), top_k=16, index_heads=4, index_dim=24).config
    counted = parameters(shape_of(sparse))
    assert counted.total == count + counted.indexer == _numbers(sparse) and counted.indexer > 0


def _numbers(built: Any) -> int:
    return sum(math.prod(shape) for shape in checkpoint.expected_tensors(built).values())


@pytest.mark.parametrize("kind", DENSE)
def test_saved_configs_hold_the_published_fields(kind: str, tmp_path: Path) -> None:
    """Both forms come back equal, and a field has the name that other programs know."""
    for name in (kind, f"{kind}_dsa"):
        model, folder = ours(config(name)), tmp_path / name
        tokensieve.save(model, folder)
        raw = checkpoint.read_config(folder)
        assert raw["model_type"] == name and raw["architectures"] == [FAMILIES[name].architecture]
        assert "num_local_experts" not in raw and raw.get("num_experts") == (8 if kind == "qwen3_moe" else None)
        again = tokensieve.load(folder)
        assert _plain(again.config) == _plain(model.config)
        state = model.state_dict()
        assert all(torch.equal(x, state[n]) for n, x in again.state_dict().items())
        assert family_of(model.config).architecture == raw["architectures"][0]
    dense = FAMILIES[kind].architecture
    assert hasattr(transformers, dense) and FAMILIES[f"{kind}_dsa"].architecture == dense.replace("For", "DSAFor")


def test_a_sparse_model_has_no_balance_loss() -> None:
    """Whatever a folder names, which a dense one keeps: TRL reads the coefficient."""
    named = config("qwen3_moe").to_dict() | {"router_aux_loss_coef": 0.02}
    assert model_config(named).router_aux_loss_coef == 0.02
    fields = family_of(named).sparse_fields(model_config(named)) | {"index_topk": 16}
    assert fields["router_aux_loss_coef"] == 0.02 and model_config(fields).router_aux_loss_coef == 0.0


def _plain(built: Any) -> dict[str, Any]:
    return {k: v for k, v in built.to_dict().items() if k not in ("dtype", "architectures", "_name_or_path")}


# attention windows

ALL, NONE = ["sliding_attention"] * 3, ["full_attention"] * 3
IDLE: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 1024}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": None, "layer_types": ALL}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 64}),
    ("qwen2", {"use_sliding_window": None, "sliding_window": 64}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 2048, "max_window_layers": 0}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0, "layer_types": NONE}),
    ("qwen3_moe", {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0}),
    ("llama", {"use_sliding_window": True, "sliding_window": 64, "layer_types": ALL}),
]
ACTING: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 1023}),
    ("mistral", {"sliding_window": 64, "layer_types": NONE}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "layer_types": NONE[:2] + ALL[:1]}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}),
]


@pytest.mark.parametrize(("kind", "fields"), IDLE)
@torch.no_grad()
def test_a_window_that_cannot_act_is_ignored(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Logits are those of transformers with the same fields, and the saved folders have no window, sparse or dense."""
    model = ours(config(kind))
    tokensieve.save(model, tmp_path / "a")
    raw = checkpoint.read_config(tmp_path / "a") | fields
    (tmp_path / "a" / "config.json").write_text(json.dumps(raw))
    ids = tokens(1, 90)
    windowed = tokensieve.load(tmp_path / "a")
    assert torch.equal(windowed(ids).logits, model(ids).logits)
    sparse = tokensieve.sparsify(windowed, top_k=16, index_heads=4, index_dim=16)
    for number, saved in enumerate((windowed, sparse)):
        tokensieve.save(saved, tmp_path / str(number))
        again = checkpoint.read_config(tmp_path / str(number))
        assert again.get("sliding_window") is None and not again.get("use_sliding_window")
        assert torch.equal(tokensieve.load(tmp_path / str(number))(ids).logits, saved(ids).logits)
    if fields.get("use_sliding_window", False) is not None and "layer_types" not in fields:
        for folder in ("a", "0"):
            oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
            assert float((oracle(ids).logits - model(ids).logits).abs().max()) < 1e-4


@pytest.mark.parametrize(("kind", "fields"), ACTING)
def test_a_window_that_acts_is_refused(kind: str, fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="sliding_window .* is not supported, .* set max_position_embeddings to"):
        ours(model_config(SHAPE | {"model_type": kind} | fields))
    shorter = fields | {"max_position_embeddings": fields["sliding_window"]}
    ours(model_config(SHAPE | {"model_type": kind} | shorter))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"num_key_value_heads": 4}, "6 attention heads cannot share 4 num_key_value_heads"),
        ("qwen2", {"head_dim": None, "hidden_size": 42}, "the width of a head is 7; it must be even"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "layer_types names 'chunked_attention'"),
        ("qwen3_moe", {"num_experts_per_tok": 9, "num_experts": 8}, "num_experts_per_tok is 9 of 8 experts"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0; it must be at least 1"),
        ("qwen3_moe", {"output_router_logits": True}, "output_router_logits is not supported, .* set it to false"),
        *((kind, {"attention_dropout": 0.1}, "attention_dropout is not supported; set it to 0") for kind in DENSE),
        *((kind, {"hidden_act": "gelu"}, "hidden_act 'gelu'") for kind in DENSE),
        *((kind, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported") for kind in DENSE),
        *((kind, {"mlp_bias": True}, "mlp_bias is not supported") for kind in DENSE if kind != "llama"),
    ],
)
def test_what_is_refused(kind: str, changes: dict[str, Any], message: str) -> None:
    raw = config(kind).to_dict() | changes
    with pytest.raises(UserError, match=message) as error:
        ours(model_config(raw))
    assert "\n" not in str(error.value) and str(error.value).startswith("config.json: ")


def test_models_without_experts_in_some_layers() -> None:
    for fields, dense in (
        ({"decoder_sparse_step": 2}, [True, False, True]),
        ({"mlp_only_layers": [0, 2]}, [True, False, True]),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [1]}, [True, True, False]),
        ({"num_experts": 0}, [True] * 3),
        ({"mlp_only_layers": None}, [False] * 3),
    ):
        built = model_config(config("qwen3_moe").to_dict() | fields)
        family = family_of(built)
        assert [family.dense_layer(built, layer) for layer in range(3)] == dense
        assert family.moe_layers(built.to_dict()) == dense.count(False)
        model, oracle = ours(built), theirs(built)
        assert sum(p.numel() for p in model.parameters()) == oracle.num_parameters() == _numbers(built)
