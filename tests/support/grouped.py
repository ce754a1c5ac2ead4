"""Small models of the families with grouped keys and values, and random configs of them."""

import random
from typing import Any

from tests.support.models import ROPES as YARNS
from tokensieve.families import FAMILIES

DENSE = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
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
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True},
}
K = 16
INDEXER = {"index_topk": K, "index_n_heads": 8, "index_head_dim": 16, "index_rope_head_dim": 8}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
UNTRUNCATED = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 128,
    "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": False,
}  # fmt: skip
# As Qwen2.5 and Qwen3 write it, and with the factor on cos and sin given.
QWEN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
GIVEN = QWEN | {"attention_factor": 1.5}
ROPES: list[dict[str, Any] | None] = [None, LINEAR, LLAMA3, UNTRUNCATED, QWEN, GIVEN, YARNS[4], YARNS[5]]


def config(kind: str, **changes: Any) -> Any:
    """The config of a small model of this model_type, dense or sparse."""
    family = FAMILIES[kind]
    own = OWN.get(kind.removesuffix("_dsa"), {}) | (INDEXER if family.sparse else {})
    return family.config(**SHAPE | own | changes)


def random_config(kind: str, seed: int) -> Any:
    """A drawn shape of a dense family; the kinds of RoPE come in turn."""
    draw = random.Random(f"{kind} {seed}")
    heads, groups = draw.choice([(4, 1), (4, 2), (6, 3), (5, 5), (8, 2)])
    layers, width = draw.choice([1, 2, 3]), draw.choice([8, 16, 24])
    changes: dict[str, Any] = {
        "hidden_size": heads * draw.choice([8, 10, 16]),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": width,
        "num_hidden_layers": layers,
        "tie_word_embeddings": draw.random() < 0.4,
        "rms_norm_eps": draw.choice([1e-6, 1e-5]),
        "rope_parameters": ROPES[seed % len(ROPES)],
    }
    biased, mlp_biased = draw.random() < 0.4, draw.random() < 0.4
    if kind in ("llama", "qwen3", "qwen3_moe"):
        changes["attention_bias"] = biased
    if kind == "llama":
        changes["mlp_bias"] = mlp_biased
    if kind == "qwen2" and biased:
        del changes["head_dim"]  # published models have none: it is hidden_size / heads
    if kind == "qwen3_moe":
        experts = draw.choice([4, 8, 9])
        changes |= {
            "num_experts": experts,
            "num_experts_per_tok": draw.choice([1, 2, 4]),
            "norm_topk_prob": draw.random() < 0.6,
            "decoder_sparse_step": draw.choice([1, 1, 2]),
            "mlp_only_layers": draw.choice([[], [0]]) if layers > 1 else [],
        }
    return config(kind, **changes)
