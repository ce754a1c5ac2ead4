"""A model_type without a row: one line that names what is supported, why this one is not, and what is nearest."""

import pytest

from tokensieve.config import UserError
from tokensieve.families import FAMILIES, family_of


@pytest.mark.parametrize(
    ("kind", "reason", "near"),
    [
        ("qwen2_moe", " (its shared expert has a gate)", "qwen3_moe"),
        ("mixtral", " (its experts have other names on disk)", "mistral"),
        ("phi3", " (its q, k and v are one tensor on disk)", None),
        ("gpt_oss", " (it has attention sinks, and some layers have a window)", None),
        ("gemma3_text", " (it scales its embedding, and has norms of another kind)", None),
        ("deepseek_vl_v2", " (it reads images; use the language model in it)", "deepseek_v2"),
        ("qwen", "", "qwen3"),
        ("lama", "", "llama"),
        ("gpt2", "", None),
        (None, "", None),
    ],
)
def test_one_line_with_the_nearest_name(kind: str | None, reason: str, near: str | None) -> None:
    with pytest.raises(UserError) as error:
        family_of({"model_type": kind}, "m/config.json")
    line, supported = str(error.value), ", ".join(FAMILIES)
    end = f"; the nearest name is {near}" if near else ""
    assert (
        line
        == f"m/config.json: model_type {kind!r} is not supported{reason}; use a checkpoint of type {supported}{end}"
    )
