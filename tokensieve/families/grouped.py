"""Llama, Mistral, Qwen2, Qwen3 and Qwen3-MoE: grouped keys and values.

All groups share the selected keys. The indexer reads the layer's normalized input, since there is no query latent.
Sources: grouped-query attention, arXiv 2305.13245; Llama 3, arXiv 2407.21783, section 3.2; Mistral 7B, arXiv
2310.06825; Qwen2, arXiv 2407.10671, section 2.2; Qwen3, arXiv 2505.09388, section 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from tokensieve.config import UserError
from tokensieve.families.family import AttentionCost, Entry, Experts, Family, Shapes, required


@dataclass(kw_only=True, repr=False)
class IndexerFields:
    """Fields of a config whose model has lightning indexers.

    `index_topk`: keys per query. `index_n_heads`, `index_head_dim`: number and width of the index heads.
    `index_rope_head_dim`: the first dims of an index head, which carry positions. `index_dtype`: as in `SparseConfig`.
    `indexer_types`: "full" for a layer with an indexer, "shared" for one that reads the keys of the layer before it;
    None: every layer has one.
    """

    index_topk: int = 2048
    index_n_heads: int = 16
    index_head_dim: int = 128
    index_rope_head_dim: int = 64
    index_dtype: Literal["bf16", "fp8"] = "bf16"
    indexer_types: list[str] | None = None


@strict
class SparseLlamaConfig(IndexerFields, LlamaConfig):
    """`llama` with indexers."""

    model_type = "llama_dsa"


@strict
class SparseMistralConfig(IndexerFields, MistralConfig):
    """`mistral` with indexers, and without the window that Mistral's config has by default."""

    model_type = "mistral_dsa"

    sliding_window: int | None = None


@strict
class SparseQwen2Config(IndexerFields, Qwen2Config):
    """`qwen2` with indexers."""

    model_type = "qwen2_dsa"


@strict
class SparseQwen3Config(IndexerFields, Qwen3Config):
    """`qwen3` with indexers."""

    model_type = "qwen3_dsa"


@strict
class SparseQwen3MoeConfig(IndexerFields, Qwen3MoeConfig):
    """`qwen3_moe` with indexers, and without the balance loss of its routers, which TRL would add."""

    model_type = "qwen3_moe_dsa"

    router_aux_loss_coef: float = 0.0


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NO_WINDOW = {"sliding_window": None, "use_sliding_window": False}


@dataclass(frozen=True)
class Grouped(Family):
    """A family with grouped keys and values.

    always_biased: projections that have a bias whatever config.json says.
    """

    always_biased: tuple[str, ...] = ()

    attention = "grouped"
    index_rope_field = "index_rope_head_dim"
    index_rope_scaled = False
    sizes: ClassVar[tuple[str, ...]] = ("num_key_value_heads", "head_dim", "index_rope_head_dim")

    def check(self, config: Any) -> None:
        super().check(config)
        heads, groups, width = config.num_attention_heads, config.num_key_value_heads, self.width(vars(config))
        if heads % groups:
            raise UserError(f"config.json: {heads} attention heads cannot share {groups} num_key_value_heads")
        if width % 2:
            raise UserError(f"config.json: the width of a head is {width}; it must be even, for pairs are rotated")
        if config.attention_dropout:
            raise UserError("config.json: attention_dropout is not supported; set it to 0")
        if (config.rope_parameters or {}).get("partial_rotary_factor", 1) != 1:
            raise UserError("config.json: partial_rotary_factor is not supported; heads are rotated whole here")
        self._check_window(config)
        if self.sparse and config.index_rope_head_dim % 2:
            raise UserError(f"config.json: index_rope_head_dim is {config.index_rope_head_dim}; it must be even")

    def _check_window(self, config: Any) -> None:
        """Raises UserError for a window that acts: one narrower than the context, in at least one layer.

        A field that transformers' class does not have is ignored, as it is there.
        """
        kinds = self._declared(config, "layer_types") or ["sliding_attention"]
        if unknown := {*kinds} - {"full_attention", "sliding_attention"}:
            raise UserError(f"config.json: layer_types names {sorted(unknown)[0]!r}, which is not supported")
        window, longest = self._declared(config, "sliding_window"), config.max_position_embeddings
        on = self._declared(config, "use_sliding_window") is not False and "sliding_attention" in kinds
        if on and window is not None and window < longest:
            raise UserError(
                f"config.json: sliding_window {window} is not supported, since selected keys may lie anywhere in the "
                f"{longest} positions; set max_position_embeddings to {window}, within which it does not act, or use "
                "a model without a window"
            )

    def _declared(self, config: Any, name: str) -> Any:
        """The value of a field that the family's config class declares; None for any other."""
        return getattr(config, name, None) if name in {field.name for field in fields(self.config)} else None

    def width(self, fields: Mapping[str, Any]) -> int:
        """Width of a head, from the fields of config.json."""
        given = fields.get("head_dim") or getattr(self.config, "head_dim", None)
        return given or required(fields, "hidden_size") // required(fields, "num_attention_heads")

    def sparse_fields(self, config: Any) -> dict[str, Any]:
        sparse = self.tidy(super().sparse_fields(config), mtp=False)
        return sparse | {"index_rope_head_dim": min(64, self.width(vars(config)))}

    def tidy(self, fields: dict[str, Any], mtp: bool) -> dict[str, Any]:
        """As in `Family`. A window that does not act is written as none, since layer_types is not written."""
        return fields | {name: off for name, off in NO_WINDOW.items() if name in fields}

    def mlp_bias(self, config: Any) -> bool:
        return bool(self._declared(config, "mlp_bias"))

    def biased(self, config: Any) -> tuple[str, ...]:
        return PROJECTIONS if self._declared(config, "attention_bias") else self.always_biased

    def attention_tensors(self, config: Any) -> Shapes:
        hidden, width = config.hidden_size, self.width(vars(config))
        queries, groups = config.num_attention_heads * width, config.num_key_value_heads * width
        rows = {"q_proj": (queries, hidden), "k_proj": (groups, hidden), "v_proj": (groups, hidden)}
        rows["o_proj"] = (hidden, queries)
        shapes: Shapes = {f"{name}.weight": shape for name, shape in rows.items()}
        shapes |= {f"{name}.bias": rows[name][:1] for name in self.biased(config)}
        return shapes | ({"q_norm.weight": (width,), "k_norm.weight": (width,)} if self.head_norms else {})

    def entry(self, config: Any) -> Entry:
        """[k, v] of each group."""
        width = self.width(vars(config))
        return Entry(config.num_key_value_heads, 2 * width, width, width, width)

    def rope(self, config: Any) -> tuple[int, bool]:
        return self.width(vars(config)), False

    def index_rope(self, config: Any) -> int:
        return config.index_rope_head_dim if self.sparse else min(64, self.width(vars(config)))

    def attention_cost(self, fields: Mapping[str, Any]) -> AttentionCost:
        hidden, heads = required(fields, "hidden_size"), required(fields, "num_attention_heads")
        groups = fields.get("num_key_value_heads", getattr(self.config, "num_key_value_heads", None)) or heads
        width = self.width(fields)
        rows = {"q_proj": heads * width, "k_proj": groups * width, "v_proj": groups * width, "o_proj": hidden}
        biases = sum(rows[name] for name in self.biased(SimpleNamespace(**fields)))
        return AttentionCost(
            heads=heads,
            weights=2 * hidden * width * (heads + groups),
            norms=biases + 2 * width * self.head_norms,
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
        return ["transformers, vLLM, SGLang: they have no grouped-query attention with an indexer"]


class GroupedExperts(Grouped):
    """A family with grouped keys and values, and with experts behind a softmax router; no expert is shared."""

    sizes = (*Grouped.sizes, "moe_intermediate_size", "num_experts_per_tok", "decoder_sparse_step")
    experts_field = "num_experts"

    def check(self, config: Any) -> None:
        super().check(config)
        if config.num_experts_per_tok > config.num_experts > 0:
            raise UserError(
                f"config.json: num_experts_per_tok is {config.num_experts_per_tok} of {config.num_experts} experts"
            )
        if config.output_router_logits:
            raise UserError(
                "config.json: output_router_logits is not supported, since no balance loss of the routers is computed; "
                "set it to false"
            )

    def readable(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """As in `Family`. A sparse model has no balance loss, whatever the dense one's coefficient was."""
        fields = super().readable(_by_published_name(raw))
        return fields | ({"router_aux_loss_coef": 0.0} if self.sparse else {})

    def tidy(self, fields: dict[str, Any], mtp: bool) -> dict[str, Any]:
        return super().tidy(_by_published_name(fields), mtp)

    def experts(self, fields: Mapping[str, Any]) -> Experts:
        return super().experts(_by_published_name(fields))

    def dense_layer(self, config: Any, layer: int) -> bool:
        fields = _by_published_name(vars(config))
        chosen = (layer + 1) % (fields.get("decoder_sparse_step") or 1) == 0
        return not chosen or layer in (fields.get("mlp_only_layers") or ()) or not fields.get("num_experts")

    def moe_layers(self, fields: Mapping[str, Any]) -> int:
        config, layers = SimpleNamespace(**fields), range(required(fields, "num_hidden_layers"))
        return sum(not self.dense_layer(config, layer) for layer in layers)

    def softmax_router(self, config: Any) -> bool:
        return True


def _by_published_name(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with the number of experts under its published name: transformers keeps it under Mixtral's."""
    return {"num_experts" if name == "num_local_experts" else name: value for name, value in fields.items()}


QKV = ("q_proj", "k_proj", "v_proj")

FAMILIES = (
    Grouped("llama", "LlamaForCausalLM", LlamaConfig, "llama_dsa"),
    Grouped("mistral", "MistralForCausalLM", MistralConfig, "mistral_dsa"),
    Grouped("qwen2", "Qwen2ForCausalLM", Qwen2Config, "qwen2_dsa", always_biased=QKV),
    Grouped("qwen3", "Qwen3ForCausalLM", Qwen3Config, "qwen3_dsa", head_norms=True),
    GroupedExperts("qwen3_moe", "Qwen3MoeForCausalLM", Qwen3MoeConfig, "qwen3_moe_dsa", head_norms=True),
    Grouped("llama_dsa", "LlamaDSAForCausalLM", SparseLlamaConfig, None),
    Grouped("mistral_dsa", "MistralDSAForCausalLM", SparseMistralConfig, None),
    Grouped("qwen2_dsa", "Qwen2DSAForCausalLM", SparseQwen2Config, None, always_biased=QKV),
    Grouped("qwen3_dsa", "Qwen3DSAForCausalLM", SparseQwen3Config, None, head_norms=True),
    GroupedExperts("qwen3_moe_dsa", "Qwen3MoeDSAForCausalLM", SparseQwen3MoeConfig, None, head_norms=True),
)
