"""Sizes of the published models that a model_type stands for, where its config class has others by default.

A sparse form has those of its dense one. A family without a row stands for its config class's own sizes.
"""

from typing import Any

PUBLISHED: dict[str, dict[str, Any]] = {
    # Llama-3.1-8B
    "llama": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    },
    # Mistral-7B-v0.3
    "mistral": {"vocab_size": 32768, "max_position_embeddings": 32768, "sliding_window": None},
    # Qwen2.5-7B
    "qwen2": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072,
    },
    # Qwen3-8B
    "qwen3": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    },
    # Qwen3-30B-A3B
    "qwen3_moe": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 40960,
    },
}  # fmt: skip
