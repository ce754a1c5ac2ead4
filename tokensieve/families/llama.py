"""Llama: grouped keys and values, one MLP per layer.

All groups share the selected keys. The indexer reads the layer's normalized input, since there is no query latent.
Source: Grattafiori et al., The Llama 3 Herd of Models, arXiv 2407.21783, section 3.2; grouped-query attention, arXiv
2305.13245.
"""

from collections.abc import Mapping
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from tokensieve.config import UserError
from tokensieve.families.family import AttentionCost, Entry, Family, Shapes, required


@strict
class SparseLlamaConfig(LlamaConfig):
    """`llama` with a lightning indexer in every layer.

    `index_topk`: keys per query. `index_n_heads`, `index_head_dim`: number and width of the index heads.
    `index_rope_head_dim`: the first dims of an index head, which carry positions. `index_dtype`: as in `SparseConfig`.
    """

    model_type = "llama_dsa"

    index_topk: int = 2048
    index_n_heads: int = 16
    index_head_dim: int = 128
    index_rope_head_dim: int = 64
    index_dtype: Literal["bf16", "fp8"] = "bf16"


class Grouped(Family):
    attention = "grouped"
    index_rope_field = "index_rope_head_dim"
    sizes = ("num_key_value_heads", "head_dim", "index_rope_head_dim")

    def check(self, config: Any) -> None:
        super().check(config)
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        if heads % groups:
            raise UserError(f"config.json: {heads} attention heads cannot share {groups} num_key_value_heads")
        if config.attention_dropout:
            raise UserError("config.json: attention_dropout is not supported; set it to 0")
        if self.sparse and config.index_rope_head_dim % 2:
            raise UserError(f"config.json: index_rope_head_dim is {config.index_rope_head_dim}; it must be even")

    def sparse_fields(self, config: Any) -> dict[str, Any]:
        return super().sparse_fields(config) | {"index_rope_head_dim": min(64, config.head_dim)}

    def mlp_bias(self, config: Any) -> bool:
        return bool(config.mlp_bias)

    def biased(self, config: Any) -> tuple[str, ...]:
        return ("q_proj", "k_proj", "v_proj", "o_proj") if config.attention_bias else ()

    def attention_tensors(self, config: Any) -> Shapes:
        hidden, width = config.hidden_size, config.head_dim
        queries, groups = config.num_attention_heads * width, config.num_key_value_heads * width
        rows = {"q_proj": (queries, hidden), "k_proj": (groups, hidden), "v_proj": (groups, hidden)}
        rows["o_proj"] = (hidden, queries)
        shapes: Shapes = {f"{name}.weight": shape for name, shape in rows.items()}
        return shapes | {f"{name}.bias": rows[name][:1] for name in self.biased(config)}

    def entry(self, config: Any) -> Entry:
        """[k, v] of each group."""
        width = config.head_dim
        return Entry(config.num_key_value_heads, 2 * width, width, width, width)

    def rope(self, config: Any) -> tuple[int, bool]:
        return config.head_dim, False

    def index_rope(self, config: Any) -> int:
        return config.index_rope_head_dim if self.sparse else min(64, config.head_dim)

    def attention_cost(self, fields: Mapping[str, Any]) -> AttentionCost:
        hidden, heads = required(fields, "hidden_size"), required(fields, "num_attention_heads")
        groups = fields.get("num_key_value_heads") or heads
        width = fields.get("head_dim") or hidden // heads
        return AttentionCost(
            heads=heads,
            weights=2 * hidden * width * (heads + groups),
            norms=0,
            masked=2 * width,
            gathered=2 * width,
            score=width,
            cached=2 * groups * width,
            rotated=0,
            kept=width * (3 * heads + 3 * groups),
            index_source=hidden,
        )

    def refusals(self, config: Any) -> list[str]:
        if not self.sparse:
            return []
        return ["transformers, vLLM, SGLang: they have no grouped-query attention with an indexer; tokensieve runs it"]


FAMILIES = (
    Grouped("llama", "LlamaForCausalLM", LlamaConfig, "llama_dsa"),
    Grouped("llama_dsa", "LlamaDSAForCausalLM", SparseLlamaConfig, None),
)
