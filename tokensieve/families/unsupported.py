"""Reasons why common types of models are not supported, and the supported name that is nearest to a given one."""

import difflib
from collections.abc import Collection
from typing import Any

# Beginning of a model_type: a thing of its models that tokensieve does not implement.
_BEYOND = {
    "chatglm": "it has code of its own, with fused tensors under other names",
    "deepseek_v4": "it compresses the keys of distant tokens",
    "deepseek_vl": "it reads images; use the language model in it by itself",
    "falcon": "it has layers that run attention and MLP in parallel",
    "gemma": "it scales its embedding, and some layers have a window",
    "glm4": "it rotates a part of each head only",
    "gpt_oss": "it has attention sinks, and some layers have a window",
    "llama4": "some layers attend within chunks",
    "mixtral": "its experts have other names on disk",
    "phi": "its q, k and v are one tensor on disk",
    "qwen2_5_vl": "it reads images; use the language model in it by itself",
    "qwen2_moe": "its shared expert has a gate",
    "qwen2_vl": "it reads images; use the language model in it by itself",
    "qwen3_5": "some layers have linear attention",
    "qwen3_next": "some layers have linear attention",
    "qwen3_vl": "it reads images; use the language model in it by itself",
}


def nearest(kind: Any, supported: Collection[str]) -> str:
    """The end of a refusal: the reason, if it is known, and the supported type with the nearest name."""
    name = str(kind)
    reasons = [reason for start, reason in _BEYOND.items() if name.startswith(start)]
    close = difflib.get_close_matches(name, supported, n=1)
    return "".join(f" ({reason})" for reason in reasons[:1]) + "".join(
        f"; the nearest name is {other}" for other in close
    )
