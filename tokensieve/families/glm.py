"""GLM-5 and GLM-4.7-Flash: DeepSeek's attention and experts.

GLM-5 is published sparse. Its indexers rotate interleaved pairs, as its attention does, and from GLM-5.2 on several
layers share one selection: a layer that config.json calls "shared" has no indexer, and reads the keys that the layer
before it reads. GLM-4.7-Flash is dense, and becomes a GLM-5 with an indexer in every layer.
Sources: the config.json of both; IndexCache, arXiv 2603.12201; transformers' `glm_moe_dsa`.
"""

from collections.abc import Mapping
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import Glm4MoeLiteConfig, GlmMoeDsaConfig

from tokensieve.config import UserError
from tokensieve.families.deepseek import DeepSeek


@strict
class SparseGlmConfig(GlmMoeDsaConfig):
    """`glm_moe_dsa` as published; `index_dtype` and a `q_lora_rank` of None are as in `SparseConfig`."""

    model_type = "glm_moe_dsa"

    q_lora_rank: int | None = 2048
    index_dtype: Literal["bf16", "fp8"] = "bf16"


class Glm4(DeepSeek):
    def sparse_fields(self, config: Any) -> dict[str, Any]:
        return super().sparse_fields(config) | _layer_kinds(config.mlp_layer_types)

    def tidy(self, fields: dict[str, Any], mtp: bool) -> dict[str, Any]:
        return super().tidy(fields, mtp) | _layer_kinds(fields["mlp_layer_types"])


class Glm5(DeepSeek):
    index_interleaved = True
    sharing_form = None

    def check(self, config: Any) -> None:
        super().check(config)
        if not getattr(config, "indexer_rope_interleave", True):
            raise UserError(
                "config.json: indexer_rope_interleave is false, which is not supported; in published models it is true"
            )

    def readable(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """As in `DeepSeek`; null in the fields about shared selections is their default."""
        pattern = raw.get("index_topk_pattern")
        if isinstance(pattern, str) and not {*pattern} <= {"F", "S"}:
            raise UserError(
                f"config.json: index_topk_pattern is {pattern!r}; it must have a letter a layer, F (full) or S (shared)"
            )
        defaults = {name for name in ("index_topk_freq", "index_skip_topk_offset") if raw.get(name) is None}
        return {k: v for k, v in super().readable(raw).items() if k not in defaults}

    def index_layers(self, fields: Mapping[str, Any]) -> int:
        kinds = fields.get("indexer_types") or self.config.from_dict(self.readable(fields)).indexer_types
        return super().index_layers({**fields, "indexer_types": kinds})

    def tidy(self, fields: dict[str, Any], mtp: bool) -> dict[str, Any]:
        """As in `DeepSeek`. vLLM and SGLang rotate halves by default, and read the pattern, not `indexer_types`."""
        fields = {"indexer_rope_interleave": True} | super().tidy(fields, mtp)
        kinds = fields.get("indexer_types") or ()
        return fields | ({"index_topk_pattern": "".join(k[0].upper() for k in kinds)} if "shared" in kinds else {})


def _layer_kinds(kinds: list[str]) -> dict[str, Any]:
    """The fields that say which layers are dense: transformers reads the list, vLLM and SGLang the number."""
    return {"mlp_layer_types": kinds, "first_k_dense_replace": kinds.count("dense")}


FAMILIES = (
    Glm4("glm4_moe_lite", "Glm4MoeLiteForCausalLM", Glm4MoeLiteConfig, "glm_moe_dsa", engine_fields=()),
    Glm5("glm_moe_dsa", "GlmMoeDsaForCausalLM", SparseGlmConfig, None, engine_fields=()),
)
