"""The numbers of a model that determine its cost, and its parameter counts.

Source: the official demo's model.py for the shapes; sections 1 and 2 of the technical report for the indexer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from tokensieve.families import AttentionCost, family_of
from tokensieve.families.family import required


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that determine its cost. 0 means that the model has none."""

    hidden: int
    layers: int
    moe_layers: int
    attention: AttentionCost
    dense_ffn: int
    expert_ffn: int
    experts: int
    shared_experts: int
    experts_per_token: int
    router_bias: bool
    mlp_bias: bool
    vocabulary: int
    tied: bool
    index_layers: int  # layers with an indexer; the others of a sparse model read the keys of the layer before
    index_heads: int
    index_dim: int
    top_k: int

    @property
    def sparse(self) -> bool:
        return self.top_k > 0


def shape_of(config: Any) -> Shape:
    """The Shape of a config object, or of a config.json read as a mapping.

    Raises UserError for a family that tokensieve does not know, and for a missing field.
    """
    family = family_of(config)
    fields = config if isinstance(config, Mapping) else vars(config) | {"model_type": family.model_type}
    moe_layers = family.moe_layers(fields)
    experts = family.experts(fields) if moe_layers else None

    def read(name: str, present: bool = True) -> int:
        return required(fields, name) if present else 0

    return Shape(
        hidden=read("hidden_size"),
        layers=read("num_hidden_layers"),
        moe_layers=moe_layers,
        attention=family.attention_cost(fields),
        dense_ffn=read("intermediate_size"),
        expert_ffn=experts.width if experts else 0,
        experts=experts.routed if experts else 0,
        shared_experts=experts.shared if experts else 0,
        experts_per_token=experts.per_token if experts else 0,
        router_bias=family.router_bias(fields),
        mlp_bias=family.mlp_bias(SimpleNamespace(**fields)),
        vocabulary=read("vocab_size"),
        tied=bool(fields.get("tie_word_embeddings")),
        index_layers=family.index_layers(fields),
        index_heads=read("index_n_heads", family.sparse),
        index_dim=read("index_head_dim", family.sparse),
        top_k=read("index_topk", family.sparse),
    )


def with_indexer(shape: Shape, top_k: int, heads: int | None = None, dim: int | None = None) -> Shape:
    """The shape of the same model with k = `top_k` and, if it is dense, with an indexer.

    heads, dim: of the indexer of a dense model; None: in the published model's proportion to its attention, which is
    one index head for two query heads (64 of 128), each as wide as a value (128).
    """
    if shape.sparse:
        return replace(shape, top_k=top_k)
    value = shape.attention.masked - shape.attention.score
    heads = heads or max(1, shape.attention.heads // 2)
    return replace(shape, top_k=top_k, index_layers=shape.layers, index_heads=heads, index_dim=dim or value)


def without_indexer(shape: Shape) -> Shape:
    """The shape of the same model with dense attention."""
    return replace(shape, top_k=0, index_layers=0, index_heads=0, index_dim=0)


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters. `matmul`: those that multiply one token, 2 FLOPs each, without the output head.

    routed: of the routed experts. router: of the matrices that choose among them, which are in `matmul`. router_bias:
    of their correction biases. head_weights: of the indexers' weights_proj, which are in `indexer_matmul`.
    """

    total: int
    active: int
    indexer: int
    matmul: int
    indexer_matmul: int
    head: int
    routed: int
    router: int
    router_bias: int
    head_weights: int


def parameters(shape: Shape) -> Parameters:
    """Exact counts, with the router's correction bias and without the multi-token-prediction layer.

    `active` counts the parameters that one token uses: the whole tables of the embedding and the head, and the experts
    that it is routed to, as in the "37B active" of the published model.
    """
    hidden, attention = shape.hidden, shape.attention.weights
    norms = shape.attention.norms + 2 * hidden
    source = shape.attention.index_source
    indexer_matmul = source * shape.index_heads * shape.index_dim + hidden * (shape.index_dim + shape.index_heads)
    indexer = shape.index_layers * (indexer_matmul + 2 * shape.index_dim)
    expert = 3 * hidden * shape.expert_ffn
    router = hidden * shape.experts
    dense_layers = shape.layers - shape.moe_layers
    dense_ffn = dense_layers * 3 * hidden * shape.dense_ffn
    mlp_bias = dense_layers * (2 * shape.dense_ffn + hidden) * shape.mlp_bias
    moe_total = shape.moe_layers * ((shape.experts + shape.shared_experts) * expert + router)
    moe_active = shape.moe_layers * ((shape.experts_per_token + shape.shared_experts) * expert + router)
    router_bias = shape.moe_layers * shape.experts * shape.router_bias
    table = shape.vocabulary * hidden
    fixed = (
        shape.layers * (attention + norms)
        + hidden
        + indexer
        + dense_ffn
        + router_bias
        + mlp_bias
        + table * (1 if shape.tied else 2)
    )
    return Parameters(
        total=fixed + moe_total,
        active=fixed + moe_active,
        indexer=indexer,
        matmul=shape.layers * attention + dense_ffn + moe_active,
        indexer_matmul=shape.index_layers * indexer_matmul,
        head=table,
        routed=shape.moe_layers * shape.experts * expert,
        router=shape.moe_layers * router,
        router_bias=router_bias,
        head_weights=shape.index_layers * hidden * shape.index_heads,
    )
