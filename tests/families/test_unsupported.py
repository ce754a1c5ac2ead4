"""A model_type without a row: one line that names what is supported, why this one is not, and what is nearest."""

import pytest

from tokensieve.config import UserError
from tokensieve.families import FAMILIES, family_of


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("qwen2_moe", "(its shared expert has a gate); the nearest name is qwen3_moe"),
        ("mixtral", "(its experts have other names on disk); the nearest name is mistral"),
        ("phi3", "(its q, k and v are one tensor on disk)"),
        ("gpt_oss", "(it has attention sinks, and some layers have a window)"),
        ("gemma3_text", "(it scales its embedding, and some layers have a window)"),
        (
            "deepseek_vl_v2",
            "(it reads images; use the language model in it by itself); the nearest name is deepseek_v2",
        ),
        ("qwen2_5_vl", "(it reads images; use the language model in it by itself); the nearest name is qwen2"),
        ("qwen", "; the nearest name is qwen3"),
        ("lama", "; the nearest name is llama"),
        ("gpt2", "qwen3_moe_dsa"),
        (None, "qwen3_moe_dsa"),
    ],
)
def test_one_line_with_the_nearest_family(kind: str | None, end: str) -> None:
    with pytest.raises(UserError) as error:
        family_of({"model_type": kind}, "m/config.json")
    line = str(error.value)
    assert line.startswith(f"m/config.json: model_type {kind!r} is not supported; use a checkpoint of type deepseek_v2")
    assert all(f" {name}" in line for name in FAMILIES) and line.endswith(end) and "\n" not in line
