"""Bytes of weights against those of built models, of every family."""

import pytest
import torch

from tests.support import grouped, models
from tokensieve import cost
from tokensieve.checkpoint.blocks import SCALE, quantized
from tokensieve.checkpoint.names import FLOAT32_SUFFIXES
from tokensieve.cost.serving import Serving
from tokensieve.families import FAMILIES, ModelConfig
from tokensieve.model import DecoderForCausalLM

ONE = Serving(cost.GPUS["h200"], gpus=1, weights="bf16")
DRAWN = {"deepseek_v2": "v2", "deepseek_v3": "v3", "deepseek_v32": "v32", "glm_moe_dsa": "glm"}
LIKE = {"kimi_k2": "v3", "glm4_moe_lite": "v3", "deepseek_v32_sharing": "v32"}  # families of the same fields
SHARED = [*models.SHAPE, "attention_bias", "tie_word_embeddings"]


def random_config(kind: str, seed: int) -> ModelConfig:
    """A drawn shape: biases, tied heads, no query latent, layers without experts, shared indexers."""
    family = FAMILIES[kind]
    if kind in DRAWN:
        return models.random_config(DRAWN[kind], seed)
    if kind in LIKE:
        fields = models.random_config(LIKE[kind], seed).to_dict()
        index = {name: fields[name] for name in models.INDEXER} if family.sparse else {}
        kinds = {"indexer_types": ["full", "shared", "full"][: fields["num_hidden_layers"]]} if index else {}
        return family.config(**{name: fields[name] for name in SHARED}, **index, **kinds)
    drawn = grouped.random_config(kind.removesuffix("_dsa"), seed)
    if not family.sparse:
        return drawn
    return family.config.from_dict(drawn.to_dict() | {"model_type": kind} | grouped.INDEXER)


def tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    """What a checkpoint of this model has, each tensor once, without values."""
    with torch.device("meta"):
        model = DecoderForCausalLM(config)
    known = [*model.named_parameters(), *model.named_buffers()]  # a tied head once
    return {name: tensor for name, tensor in known if not name.endswith("inv_freq")}


def itemsize(name: str) -> int:
    return 4 if name.endswith(FLOAT32_SUFFIXES) else 2


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", FAMILIES)
def test_weights_are_those_of_a_built_model(kind: str, seed: int) -> None:
    config = random_config(kind, seed)
    found, shape = tensors(config), cost.shape_of(config)
    assert cost.parameters(shape).total == sum(tensor.numel() for tensor in found.values())
    assert cost.weight_bytes(shape, ONE) == sum(tensor.numel() * itemsize(name) for name, tensor in found.items())


BLOCKS = {
    "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "num_attention_heads": 2,
    "num_key_value_heads": 2, "kv_lora_rank": 128, "q_lora_rank": 128, "qk_rope_head_dim": 128, "qk_nope_head_dim": 128,
    "v_head_dim": 128, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "index_n_heads": 2, "index_head_dim": 128,
}  # fmt: skip


def test_weights_in_fp8_are_those_of_a_checkpoint_in_blocks() -> None:
    """Whole blocks: a matrix whose sides are no multiples of 128 has a few scales more than are counted."""
    config = models.config("v32", **BLOCKS)
    stored = 0
    for name, tensor in tensors(config).items():
        parts = tensor.flatten(0, -3) if tensor.dim() > 2 else tensor[None]  # a layer's experts are one tensor
        for part in parts:
            for what, values in quantized(name, torch.ones(part.shape)):
                in_blocks = values.dtype == torch.float8_e4m3fn or what.endswith(SCALE)
                stored += values.numel() * (values.element_size() if in_blocks else itemsize(name))
    shape = cost.shape_of(config)
    fp8 = cost.weight_bytes(shape, Serving(cost.GPUS["h200"], gpus=1, weights="fp8"))
    assert fp8 == pytest.approx(stored, rel=1e-9)
    # A step reads all but the embedding, the norms and the biases.
    unread = 2 * (shape.vocabulary * shape.hidden + shape.hidden) + 4 * cost.parameters(shape).router_bias
    unread += 2 * shape.layers * (2 * shape.hidden + shape.attention.norms) + 2 * shape.index_layers * 2 * 128
    assert cost.decode_weight_bytes(shape, 1e9, "fp8") == pytest.approx(fp8 - unread, rel=1e-9)
