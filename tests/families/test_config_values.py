"""Values of config.json that published models have and transformers' config classes refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tokensieve
from tests.support.models import SHAPE, config, ours, tokens
from tokensieve import checkpoint
from tokensieve.config import UserError
from tokensieve.families import FAMILIES, model_config
from tokensieve.model import DecoderForCausalLM


@pytest.mark.parametrize("family", FAMILIES)
def test_integers_become_floats(family: str) -> None:
    fields = {"routed_scaling_factor": 1, "initializer_range": 1, "rms_norm_eps": 1, "rope_theta": 50000}
    built = model_config(SHAPE | {"model_type": family, "norm_topk_prob": False} | fields)
    assert type(built.rms_norm_eps) is float and built.rope_parameters["rope_theta"] == 50000
    assert type(built.initializer_range) is float
    assert built.num_hidden_layers == 3 and type(built.num_hidden_layers) is int


NULLS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"n_group": None, "topk_group": None}, {"n_group": 1, "topk_group": 1}),
    ({"n_shared_experts": None}, {"n_shared_experts": 0}),
    ({"first_k_dense_replace": None, "mlp_layer_types": None}, {"first_k_dense_replace": 0}),
    ({"attention_bias": None, "tie_word_embeddings": None}, {"attention_bias": False, "tie_word_embeddings": False}),
    ({"norm_topk_prob": None}, {"norm_topk_prob": False}),
    (
        {"n_routed_experts": None, "num_experts_per_tok": None, "moe_intermediate_size": None, "mlp_layer_types": None},
        {"first_k_dense_replace": 3},
    ),
]


@pytest.mark.parametrize("family", ["v2", "v3", "v32"])
def test_a_null_count_is_none_of_it(family: str, tmp_path: Path) -> None:
    for number, (nulls, values) in enumerate(NULLS):
        off = {"norm_topk_prob": False} if family == "v2" else {}
        model, folder = ours(config(family, **(off | values))), tmp_path / str(number)
        tokensieve.save(model, folder)
        raw = checkpoint.read_config(folder) | nulls
        (folder / "config.json").write_text("\ufeff" + json.dumps(raw), encoding="utf-8")  # with a byte order mark
        ids = tokens(1, 20)
        with torch.no_grad():
            assert torch.equal(tokensieve.load(folder)(ids).logits, model(ids).logits), nulls


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"torch_dtype": "float99"}, "has no attribute 'float99'; correct the field"),
        ({"num_nextn_predict_layers": "1"}, "num_nextn_predict_layers is '1'; it must be a number of layers"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2, which is not supported"),
    ],
)
def test_other_values_are_refused_in_one_line(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint), torch.device("meta"):
        DecoderForCausalLM(model_config(SHAPE | {"model_type": "deepseek_v3"} | fields))


def test_each_projection_has_its_own_bias() -> None:
    """A family says which projections of the attention have a bias: llama all four if config.json does, qwen2 three."""
    for kind, biased in (("llama", "qkvo"), ("qwen2", "qkv"), ("mistral", ""), ("qwen3", "qkvo")):
        raw = SHAPE | {"model_type": kind, "attention_bias": True, "num_key_value_heads": 2, "sliding_window": None}
        with torch.device("meta"):
            model = DecoderForCausalLM(model_config(raw))
        names = {name for name in model.state_dict() if name.endswith("_proj.bias")}
        assert names == {f"model.layers.{i}.self_attn.{x}_proj.bias" for i in range(3) for x in biased}, kind
        assert model.state_dict().keys() == checkpoint.memory_layout(model.config).keys()
