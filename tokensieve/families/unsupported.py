"""Refusal of a model_type without a row: why common ones are not supported, and which supported name is nearest."""

import difflib
from collections.abc import Collection
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


def refusal(kind: Any, supported: Collection[str]) -> str:
    """A line on a model_type that is not supported: the reason, if it is known, and what is supported instead."""
    reason = next((f" ({reason})" for reason, kinds in _BEYOND.items() if str(kind) in kinds.split()), "")
    near = "".join(f"; the nearest name is {name}" for name in difflib.get_close_matches(str(kind), supported, n=1))
    return f"model_type {kind!r} is not supported{reason}; use a checkpoint of type {', '.join(supported)}{near}"
