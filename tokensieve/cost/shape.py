"""The numbers of a model that its cost depends on, and its parameter counts.

Source: the official demo's model.py for the shapes; sections 1 and 2 of the technical report for the indexer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokensieve.config import UserError


@dataclass(frozen=True)
class Shape:
    """The numbers of a multi-head latent attention model that cost depends on. 0 stands for "has none"."""

    hidden: int
    layers: int
    moe_layers: int
    heads: int
    q_lora: int
    kv_lora: int
    nope: int
    rope: int
    value: int
    dense_ffn: int
    expert_ffn: int
    experts: int
    shared_experts: int
    experts_per_token: int
    router_bias: bool
    vocabulary: int
    tied: bool
    index_heads: int
    index_dim: int
    top_k: int

    @property
    def sparse(self) -> bool:
        return self.top_k > 0


def shape_of(config: Any) -> Shape:
    """The Shape of a Hugging Face config object or of a config.json read as a mapping.

    Models: deepseek_v2, deepseek_v3, deepseek_v32. Raises UserError for another architecture, naming what is missing.
    """
    fields = config if isinstance(config, Mapping) else vars(config)
    kind = fields.get("model_type") or getattr(config, "model_type", None)

    def read(name: str) -> int:
        value = fields.get(name)
        if value is None:
            raise UserError(f"a config of type {kind!r} has no {name}: costs are known for deepseek_v2, _v3 and _v32")
        return int(value)

    layers = read("num_hidden_layers")
    kinds = fields.get("mlp_layer_types")
    experts = fields.get("n_routed_experts") or 0
    moe_layers = kinds.count("sparse") if kinds else max(0, layers - (fields.get("first_k_dense_replace") or 0))
    moe_layers = moe_layers if experts else 0
    sparse = kind not in ("deepseek_v2", "deepseek_v3") and fields.get("index_topk") is not None
    return Shape(
        hidden=read("hidden_size"),
        layers=layers,
        moe_layers=moe_layers,
        heads=read("num_attention_heads"),
        q_lora=fields.get("q_lora_rank") or 0,
        kv_lora=read("kv_lora_rank"),
        nope=read("qk_nope_head_dim"),
        rope=read("qk_rope_head_dim"),
        value=read("v_head_dim"),
        dense_ffn=read("intermediate_size"),
        expert_ffn=read("moe_intermediate_size") if moe_layers else 0,
        experts=experts if moe_layers else 0,
        shared_experts=(fields.get("n_shared_experts") or 0) if moe_layers else 0,
        experts_per_token=read("num_experts_per_tok") if moe_layers else 0,
        router_bias=kind != "deepseek_v2" and fields.get("topk_method", "noaux_tc") == "noaux_tc",
        vocabulary=read("vocab_size"),
        tied=bool(fields.get("tie_word_embeddings")),
        index_heads=read("index_n_heads") if sparse else 0,
        index_dim=read("index_head_dim") if sparse else 0,
        top_k=read("index_topk") if sparse else 0,
    )


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters. `matmul` are those that multiply one token: 2 FLOPs each, the output head apart."""

    total: int
    active: int
    indexer: int
    matmul: int
    indexer_matmul: int
    head: int


def parameters(shape: Shape) -> Parameters:
    """Exact counts, without the multi-token-prediction layer; the router's correction bias counts.

    `active` is what one token uses: the embedding's and the head's whole tables, and the experts it is routed to, as in
    the "37B active" of the published model.
    """
    hidden, heads = shape.hidden, shape.heads
    q_input = shape.q_lora or hidden
    attention = (
        hidden * shape.q_lora
        + q_input * heads * (shape.nope + shape.rope)
        + hidden * (shape.kv_lora + shape.rope)
        + shape.kv_lora * heads * (shape.nope + shape.value)
        + heads * shape.value * hidden
    )
    norms = shape.q_lora + shape.kv_lora + 2 * hidden
    indexer_matmul = q_input * shape.index_heads * shape.index_dim + hidden * (shape.index_dim + shape.index_heads)
    indexer = shape.layers * (indexer_matmul + 2 * shape.index_dim)
    expert = 3 * hidden * shape.expert_ffn
    router = hidden * shape.experts
    dense_layers = shape.layers - shape.moe_layers
    dense_ffn = dense_layers * 3 * hidden * shape.dense_ffn
    moe_total = shape.moe_layers * ((shape.experts + shape.shared_experts) * expert + router)
    moe_active = shape.moe_layers * ((shape.experts_per_token + shape.shared_experts) * expert + router)
    bias = shape.moe_layers * shape.experts * shape.router_bias
    table = shape.vocabulary * hidden
    fixed = shape.layers * (attention + norms) + hidden + indexer + dense_ffn + bias + table * (1 if shape.tied else 2)
    return Parameters(
        total=fixed + moe_total,
        active=fixed + moe_active,
        indexer=indexer,
        matmul=shape.layers * attention + dense_ffn + moe_active,
        indexer_matmul=shape.layers * indexer_matmul,
        head=table,
    )
