"""DeepSeek-V2, V3 and V3.2: multi-head latent attention, experts with a shared one.

Sources: DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3 report, section 2.1; DeepSeek-V3.2-Exp report, section
2; the official demo's model.py for the indexer's names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import DeepseekV2Config, DeepseekV3Config, DeepseekV32Config

from tokensieve.config import UserError
from tokensieve.families.family import TOP_K_BY_LAYER, AttentionCost, Entry, Family, Shapes, required


@strict
class SparseConfig(DeepseekV32Config):
    """`deepseek_v32` as published, and fields that a sparsified model of another family needs.

    `index_dtype`: arithmetic of the index scores in training, evaluation and serving alike. "bf16" scores in the
    model's own dtype; "fp8" rotates by a Hadamard matrix and rounds to E4M3 blocks first. `scoring_func`: the router's,
    "sigmoid" (V3) or "softmax" (V2). `q_lora_rank` may be None: then the indexer reads the layer's normalized input
    instead of the query latent.
    """

    model_type = "deepseek_v32"

    q_lora_rank: int | None = 1536
    index_dtype: Literal["bf16", "fp8"] = "bf16"
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: str = "noaux_tc"


@strict
class SharingConfig(SparseConfig):
    """A `deepseek_v32` in which layers share indexers, as `indexer_types` says: "full" or "shared", for each layer.

    It has a model_type of its own, since transformers' class would give every layer an indexer, a random one if the
    folder has none.
    """

    model_type = "deepseek_v32_sharing"

    indexer_types: list[str] | None = None


# Fields that vLLM and SGLang need: they replace missing ones by the 671B model's numbers, or assume V2's router.
READ = tuple(
    (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings "
        "rms_norm_eps q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts "
        "n_shared_experts moe_intermediate_size num_experts_per_tok norm_topk_prob routed_scaling_factor n_group "
        "topk_group first_k_dense_replace moe_layer_freq rope_theta"
    ).split()
)
READ_OF_V3 = (*READ, "scoring_func", "topk_method")
READ_OF_V32 = (*READ_OF_V3, "index_topk", "index_n_heads", "index_head_dim")


NULL_COUNTS = {
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 0,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
}


@dataclass(frozen=True)
class DeepSeek(Family):
    softmax_scores: bool = False  # the router of V2
    engine_fields: tuple[str, ...] = READ

    attention = "latent"
    index_rope_field = "qk_rope_head_dim"
    derived = ("head_dim", "qk_head_dim")
    softmax_mscale = True
    divisible = True
    sharing_form: ClassVar[str | None] = "deepseek_v32_sharing"
    sizes = (
        "moe_intermediate_size",
        "kv_lora_rank",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_routed_experts",
        "num_experts_per_tok",
    )

    def check(self, config: Any) -> None:
        super().check(config)
        mtp, every = getattr(config, "num_nextn_predict_layers", 0), getattr(config, "moe_layer_freq", None)
        if type(mtp) is not int or mtp < 0:
            raise UserError(f"config.json: num_nextn_predict_layers is {mtp!r}; it must be a number of layers")
        if every not in (None, 1):
            raise UserError(
                f"config.json: moe_layer_freq is {every!r}, which is not supported; in published models it is 1"
            )
        if config.qk_rope_head_dim % 2:
            raise UserError(
                f"config.json: qk_rope_head_dim is {config.qk_rope_head_dim}; it must be even, for pairs are rotated"
            )
        experts, groups, best = config.n_routed_experts, config.n_group or 1, config.topk_group or 1
        if experts % groups or best > groups:
            raise UserError(
                f"config.json: {experts} experts cannot form {groups} groups of which {best} are chosen; "
                "correct n_group"
            )
        reachable = experts if getattr(config, "topk_method", None) == "greedy" else experts // groups * best
        chosen = config.num_experts_per_tok
        if chosen is None or chosen > reachable:
            raise UserError(
                f"config.json: num_experts_per_tok is {chosen} of {reachable} experts that a token can reach"
            )
        if self.softmax_router(config) and config.norm_topk_prob:
            raise UserError(
                "config.json: norm_topk_prob with a softmax router is not supported; "
                "no published DeepSeek-V2 model uses it"
            )

    def readable(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """As in `Family`; a null count is what the published code makes of it.

        No groups are one group, which is chosen. No shared experts, dense layers or MTP layers are 0 of them. Without
        routed experts every layer is dense.
        """
        fields = super().readable(raw)
        if "n_routed_experts" in raw and raw["n_routed_experts"] is None:
            one = dict.fromkeys(("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group"), 1)
            one["moe_intermediate_size"] = raw.get("moe_intermediate_size") or 1
            layers = raw.get("num_hidden_layers", self.config.num_hidden_layers)
            fields |= one | {"first_k_dense_replace": layers, "mlp_layer_types": None}
        counts = NULL_COUNTS | {"num_key_value_heads": fields.get("num_attention_heads")}
        return fields | {k: count for k, count in counts.items() if fields.get(k, count) is None and count is not None}

    def sparse_fields(self, config: Any) -> dict[str, Any]:
        fields = super().sparse_fields(config)
        fields = {k: v for k, v in fields.items() if k not in ("mlp_layer_types", "head_dim")}
        if self.softmax_scores:
            fields |= {"scoring_func": "softmax", "n_group": config.n_group or 1, "topk_group": config.topk_group or 1}
        return fields

    def dense_layer(self, config: Any, layer: int) -> bool:
        kinds = getattr(config, "mlp_layer_types", None)
        return layer < (config.first_k_dense_replace or 0) if kinds is None else kinds[layer] == "dense"

    def softmax_router(self, config: Any) -> bool:
        return self.softmax_scores or getattr(config, "scoring_func", "sigmoid") == "softmax"

    def attention_tensors(self, config: Any) -> Shapes:
        hidden, heads, q_rank, kv_rank = (
            config.hidden_size,
            config.num_attention_heads,
            config.q_lora_rank,
            config.kv_lora_rank,
        )
        nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        shapes: Shapes = {}
        if q_rank is None:
            shapes["q_proj.weight"] = (heads * (nope + rope), hidden)
        else:
            shapes["q_a_proj.weight"] = (q_rank, hidden)
            shapes["q_a_layernorm.weight"] = (q_rank,)
            shapes["q_b_proj.weight"] = (heads * (nope + rope), q_rank)
        shapes["kv_a_proj_with_mqa.weight"] = (kv_rank + rope, hidden)
        shapes["kv_a_layernorm.weight"] = (kv_rank,)
        shapes["kv_b_proj.weight"] = (heads * (nope + value), kv_rank)
        shapes["o_proj.weight"] = (hidden, heads * value)
        return shapes | {f"{name}.bias": shapes[f"{name}.weight"][:1] for name in self.biased(config)}

    def biased(self, config: Any) -> tuple[str, ...]:
        if not config.attention_bias:
            return ()
        queries = () if config.q_lora_rank is None else ("q_a_proj",)
        return (*queries, "kv_a_proj_with_mqa", "o_proj")

    def entry(self, config: Any) -> Entry:
        """[c_KV, k_R], shared by all heads; the value is c_KV."""
        width = config.kv_lora_rank + config.qk_rope_head_dim
        return Entry(1, width, width, 0, config.kv_lora_rank)

    def rope(self, config: Any) -> tuple[int, bool]:
        return config.qk_rope_head_dim, getattr(config, "rope_interleave", True)

    def index_rope(self, config: Any) -> int:
        return config.qk_rope_head_dim

    def index_source(self, config: Any) -> int:
        return config.q_lora_rank or config.hidden_size

    def attention_cost(self, fields: Mapping[str, Any]) -> AttentionCost:
        hidden, heads = required(fields, "hidden_size"), required(fields, "num_attention_heads")
        q_lora, kv_lora = fields.get("q_lora_rank") or 0, required(fields, "kv_lora_rank")
        nope, rope = required(fields, "qk_nope_head_dim"), required(fields, "qk_rope_head_dim")
        value = required(fields, "v_head_dim")
        source = q_lora or hidden
        weights = hidden * q_lora + source * heads * (nope + rope) + hidden * (kv_lora + rope)
        weights += kv_lora * heads * (nope + value) + heads * value * hidden
        biases = (q_lora + kv_lora + rope + hidden) * bool(fields.get("attention_bias"))
        return AttentionCost(
            heads=heads,
            weights=weights,
            norms=q_lora + kv_lora + biases,
            masked=nope + rope + value,
            gathered=2 * kv_lora + rope,
            score=nope + rope,
            cached=kv_lora + rope,
            rotated=rope,
            kept=4 * heads * (nope + rope) + heads * (nope + 2 * value) + 2 * (q_lora + kv_lora),
            index_source=source,
        )

    def moe_layers(self, fields: Mapping[str, Any]) -> int:
        if not fields.get("n_routed_experts"):
            return 0
        kinds, layers = fields.get("mlp_layer_types"), required(fields, "num_hidden_layers")
        return kinds.count("sparse") if kinds else max(0, layers - (fields.get("first_k_dense_replace") or 0))

    def router_bias(self, fields: Mapping[str, Any]) -> bool:
        return not self.softmax_scores and fields.get("topk_method", "noaux_tc") == "noaux_tc"

    def tidy(self, fields: dict[str, Any], mtp: bool) -> dict[str, Any]:
        layers, dense = fields.get("num_hidden_layers", 0), fields.get("first_k_dense_replace", 0)
        if fields.get("mlp_layer_types") == _layer_kinds(layers, dense):
            fields = {k: v for k, v in fields.items() if k != "mlp_layer_types"}
        fields = {"moe_layer_freq": 1} | fields  # SGLang has no default for it
        if not self.softmax_scores:
            # vLLM and SGLang build the correction bias only for "noaux_tc", and route by softmax by default.
            defaults: dict[str, Any] = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
            fields = defaults | fields
            fields["num_nextn_predict_layers"] = (fields.get("num_nextn_predict_layers") or 0) if mtp else 0
        return fields

    def refusals(self, config: Any) -> list[str]:
        """Reasons as in `Family.refusals`.

        Required widths are those that the sparse kernels of vLLM and SGLang are built for: FlashMLA (keys of 512 + 64;
        prefill takes selected keys 128 at a time), DeepGEMM (32 or 64 index heads of 128), sgl-kernel's top-k (2048
        alone). Source: their model files for DeepSeek V2 to V3.2 and the assertions of these kernels, read in 2026.
        """
        reasons: list[str] = []
        engines, everything = "vLLM, SGLang: ", "transformers, vLLM, SGLang: "
        if self.sparse and config.q_lora_rank is None:
            reasons.append(
                everything + "the indexer reads the query latent, and this model has none (q_lora_rank is null)"
            )
        if self.sharing_form and "shared" in (getattr(config, "indexer_types", None) or ()):
            reasons.append(
                everything + "layers share indexers, which they know in glm_moe_dsa alone; tokensieve runs it"
            )
        if getattr(config, TOP_K_BY_LAYER, None) is not None:
            reasons.append(everything + "all layers select index_topk keys there; tokensieve gives each its own number")
        if not self.softmax_scores and self.softmax_router(config):
            reasons.append(everything + f"the router is sigmoid there, here it is {config.scoring_func}")
        if config.tie_word_embeddings:
            reasons.append(engines + "lm_head is a tensor of its own there, here it is tied to the embedding")
        if config.attention_bias:
            reasons.append(engines + "attention projections have no bias there (attention_bias is true)")
        if not getattr(config, "rope_interleave", True):
            programs = everything if self.sparse else engines
            reasons.append(
                programs + "MLA rotates interleaved pairs there, here halves of the vector (rope_interleave is false)"
            )
        kinds = getattr(config, "mlp_layer_types", None)
        if kinds is not None and kinds != _layer_kinds(
            config.num_hidden_layers, getattr(config, "first_k_dense_replace", kinds.count("dense"))
        ):
            reasons.append(engines + "dense layers can only come first (mlp_layer_types)")
        if not self.sparse:
            return reasons
        widths = {
            "index_head_dim": (128,),
            "index_n_heads": (32, 64),
            "kv_lora_rank": (512,),
            "qk_rope_head_dim": (64,),
        }
        mismatches = [
            f"{field} {' or '.join(map(str, supported))} (here {getattr(config, field)})"
            for field, supported in widths.items()
            if getattr(config, field) not in supported
        ]
        if mismatches:
            reasons.append(engines + f"the sparse kernels need {', '.join(mismatches)}")
        if config.index_topk % 128:
            reasons.append(
                f"vLLM: the sparse kernels need an index_topk that is a multiple of 128 (here {config.index_topk})"
            )
        if config.index_topk != 2048:
            reasons.append(f"SGLang: the top-k kernel needs index_topk 2048 (here {config.index_topk})")
        return reasons


def _layer_kinds(layers: int, dense: int) -> list[str]:
    return ["dense"] * min(dense, layers) + ["sparse"] * (layers - min(dense, layers))


FAMILIES = (
    DeepSeek("deepseek_v2", "DeepseekV2ForCausalLM", DeepseekV2Config, "deepseek_v32", softmax_scores=True),
    DeepSeek("deepseek_v3", "DeepseekV3ForCausalLM", DeepseekV3Config, "deepseek_v32", engine_fields=READ_OF_V3),
    DeepSeek("deepseek_v32", "DeepseekV32ForCausalLM", SparseConfig, None, READ_OF_V32, engines_encode_chat=True),
    DeepSeek("deepseek_v32_sharing", "DeepseekV32SharingForCausalLM", SharingConfig, None, engine_fields=()),
)
