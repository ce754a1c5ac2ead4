"""A model_type without a row: one line with what is supported, why this one is not, and the nearest family."""

from types import SimpleNamespace
from typing import Any

import pytest

from tokensieve.config import UserError
from tokensieve.families import FAMILIES, family_of

HEADS = {"num_attention_heads": 8}


@pytest.mark.parametrize(
    ("kind", "fields", "reason", "near"),
    [
        ("qwen2_moe", HEADS, " (its shared expert has a gate)", "qwen3_moe"),
        ("mixtral", HEADS, " (its experts have other names on disk)", "mistral"),
        ("deepseek_vl_v2", {}, " (it reads images; use the language model in it)", "deepseek_v2"),
        ("qwen", HEADS, "", "qwen3"),
        ("lama", HEADS, "", "llama"),
        # of names that are like none by what their layers hold
        ("phi3", HEADS, " (its q, k and v are one tensor on disk)", "llama"),
        ("gemma3_text", HEADS, " (it scales its embedding, and has norms of another kind)", "llama"),
        ("gpt2", {"n_head": 12}, "", "llama"),
        (
            "gpt_oss",
            HEADS | {"num_local_experts": 32},
            " (it has attention sinks, and some layers have a window)",
            "qwen3_moe",
        ),
        ("minicpm3", HEADS | {"kv_lora_rank": 256}, "", "deepseek_v3"),
        ("mamba", {"state_size": 16}, "", None),
        (None, {}, "", None),
    ],
)
def test_one_line_with_the_nearest_family(
    kind: str | None, fields: dict[str, Any], reason: str, near: str | None
) -> None:
    for config in ({"model_type": kind, **fields}, SimpleNamespace(model_type=kind, **fields)):
        with pytest.raises(UserError) as error:
            family_of(config, "m/config.json")
        line, supported = str(error.value), ", ".join(FAMILIES)
        end = f"; the nearest family is {near}" if near else ""
        assert line == (
            f"m/config.json: model_type {kind!r} is not supported{reason}; use a checkpoint of type {supported}{end}"
        )
