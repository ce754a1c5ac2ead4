"""Refusal of a model_type without a row: why common ones are not supported, and which supported family is nearest."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

# A thing that tokensieve does not implement: the types whose models have it.
_BEYOND = {
    "it reads images; use the language model in it": "deepseek_vl deepseek_vl_v2 qwen2_vl qwen2_5_vl qwen3_vl",
    "it scales its embedding, and has norms of another kind": "gemma gemma2 gemma3 gemma3_text",
    "it rotates a part of each head only": "glm4 glm4_moe",
    "it has attention sinks, and some layers have a window": "gpt_oss",
    "some layers attend within chunks": "llama4 llama4_text",
    "some layers have linear attention": "qwen3_next qwen3_5 qwen3_5_moe",
    "its layers attend to compressed keys": "deepseek_v4",
    "its experts have other names on disk": "mixtral",
    "its q, k and v are one tensor on disk": "phi3",
    "its shared expert has a gate": "qwen2_moe",
}


def refusal(config: Any, kind: Any, supported: Collection[str]) -> str:
    """A line on a model_type that is not supported: the reason, if it is known, what is supported, and what is nearest.

    config: a config object or the fields of a config.json.
    """
    reason = next((f" ({reason})" for reason, kinds in _BEYOND.items() if str(kind) in kinds.split()), "")
    fields = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    near = nearest(str(kind), fields, supported)
    return f"model_type {kind!r} is not supported{reason}; use a checkpoint of type {', '.join(supported)}" + (
        f"; the nearest family is {near}" if near else ""
    )


def nearest(kind: str, fields: Mapping[str, Any], supported: Collection[str]) -> str | None:
    """The supported model_type of the most similar name, else the one whose layers are built most alike; None for a
    model without attention heads.
    """
    if close := difflib.get_close_matches(kind, supported, n=1, cutoff=0.7):  # mamba is not llama
        return close[0]
    if fields.get("kv_lora_rank"):
        return "deepseek_v3"
    if any(fields.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "qwen3_moe"
    return "llama" if any(fields.get(name) for name in ("num_attention_heads", "n_head")) else None
