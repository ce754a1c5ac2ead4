"""A family of models, one row of one class, for configs, costs, checkpoints, the model and the engine.

Everything that depends on the architecture is here. No other place compares `model_type`, or reads a field that only
some families have.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from transformers import PreTrainedConfig

from tokensieve.config import UserError
from tokensieve.families.rope_fields import check_rope

Shapes = dict[str, tuple[int, ...]]  # tensor name -> shape


class Entry(NamedTuple):
    """Layout of the numbers that attention reads of one token: `groups` entries of `width` numbers.

    The key is the first `d_k` numbers of an entry, the value the `d_v` numbers from `v_start` on. They may overlap, as
    in MLA.
    """

    groups: int
    width: int
    d_k: int
    v_start: int
    d_v: int

    @property
    def numbers(self) -> int:
        """Numbers per token, all groups together."""
        return self.groups * self.width


class AttentionCost(NamedTuple):
    """Costs of the attention of one layer, in numbers; `tokensieve.cost` converts them to FLOPs and bytes.

    heads: query heads. weights: parameters that multiply each token. norms: parameters of norms and biases inside the
    attention.
    masked: multiplications per head, query and key, score and value, if keys and values are read per head.
    gathered: the same if the cached entries themselves are read. score: those of the score alone, per head.
    cached: numbers per token in the cache. rotated: how many of them carry positions and stay bfloat16 in an FP8 cache.
    kept: numbers per token that one layer's backward pass needs. index_source: width of the input of the index queries.
    """

    heads: int
    weights: int
    norms: int
    masked: int
    gathered: int
    score: int
    cached: int
    rotated: int
    kept: int
    index_source: int


class Experts(NamedTuple):
    """The experts of one layer.

    routed: their number, of which `per_token` get a token. width: the inner width of each. shared: further experts,
    which every token passes through. groups, best_groups: a token's experts are in `best_groups` of `groups` groups.
    scale: a factor on the routed experts' weights. normalize: whether the weights sum to 1 before it.
    """

    routed: int
    per_token: int
    width: int
    shared: int
    groups: int
    best_groups: int
    scale: float
    normalize: bool


@dataclass(frozen=True)
class Family(ABC):
    """One family. Methods take the family's config object; those with a `fields` parameter take its fields.

    sparse_form: model_type of the same model with indexers; None for a family that has them. sharing_form: model_type
    of a sparse model in which layers share indexers; None: its own.
    """

    model_type: str
    architecture: str  # transformers' name of the class, for config.json
    config: type[PreTrainedConfig]
    sparse_form: str | None

    attention: ClassVar[Literal["latent", "grouped"]]  # the class of `tokensieve.model` that attends
    sizes: ClassVar[tuple[str, ...]]  # fields that must be at least 1 if they are given
    index_rope_field: ClassVar[str]  # field with the number of dims of an index head that carry positions
    index_interleaved: ClassVar[bool] = False  # whether neighbours form the indexer's rotated pairs (or halves)
    derived: ClassVar[tuple[str, ...]] = ()  # fields that follow from others: they are not written
    sharing_form: ClassVar[str | None] = None
    engine_fields: tuple[str, ...] = ()  # of config.json, needed by vLLM and SGLang; none: `deploy` has no plan for it
    softmax_mscale: ClassVar[bool] = False  # whether YaRN's mscale_all_dim is a factor of the softmax scale too
    engines_encode_chat: bool = False  # whether vLLM and SGLang encode chats without a chat template
    head_norms: bool = False  # whether queries and keys are normalized per head before they are rotated
    divisible: ClassVar[bool] = False  # whether ranks can divide such a model, as the official demo's shards do
    index_rope_scaled: ClassVar[bool] = True  # whether YaRN's factor on cos and sin is the indexer's too
    experts_field: ClassVar[str] = "n_routed_experts"  # field with the number of routed experts

    @property
    def sparse(self) -> bool:
        """Whether these models have indexers."""
        return self.sparse_form is None

    def check(self, config: Any) -> None:
        """Raises UserError, naming the field, if config.json has an unsupported value or contradicts itself."""
        for field in (*COMMON_SIZES, *self.sizes):
            value = getattr(config, field, None)
            if value is not None and value < 1:
                raise UserError(f"config.json: {field} is {value}; it must be at least 1")
        if config.hidden_act != "silu":
            raise UserError(f"config.json: hidden_act {config.hidden_act!r} is not supported; use a model with 'silu'")
        check_rope("rope_parameters", config.rope_parameters)
        if not self.sparse:
            return
        self._check_indexer_types(config)
        self._check_top_k(config)

    def _check_indexer_types(self, config: Any) -> None:
        kinds, layers = getattr(config, "indexer_types", None), config.num_hidden_layers
        if kinds is None:
            return
        if len(kinds) < layers or kinds[0] != "full" or not {*kinds} <= {"full", "shared"}:
            raise UserError(
                f"config.json: indexer_types must be 'full' or 'shared' for each of {layers} layers, and 'full' for "
                "the first, since no layer before it selects; copy it from the original config.json"
            )

    def _check_top_k(self, config: Any) -> None:
        ks, k, layers = getattr(config, TOP_K_BY_LAYER, None), config.index_topk, config.num_hidden_layers
        if ks is None:
            return
        whole = isinstance(ks, list | tuple) and all(type(n) is int and n > 0 for n in ks)
        if not whole or len(ks) != layers or sum(ks) != layers * k:
            raise UserError(
                f"config.json: {TOP_K_BY_LAYER} is {ks}; it must give each of {layers} layers at least 1 key, and "
                f"index_topk = {k} in the mean"
            )
        for layer in range(1, layers):
            if not self.has_indexer(config, layer) and ks[layer] != ks[layer - 1]:
                raise UserError(
                    f"config.json: {TOP_K_BY_LAYER} gives layer {layer} {ks[layer]} keys, and it reads the "
                    f"{ks[layer - 1]} of the layer before it; give both as many"
                )

    def readable(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a config.json with the types of the config class: `routed_scaling_factor` 1 becomes 1.0.

        A null switch is off, as for the programs that wrote it.
        """
        floats = {f.name for f in dataclasses.fields(self.config) if float in (get_args(f.type) or (f.type,))}
        switches = {name: False for name in SWITCHES if raw.get(name, False) is None}
        return {k: float(v) if k in floats and type(v) is int else v for k, v in raw.items()} | switches

    def sparse_fields(self, config: Any) -> dict[str, Any]:
        """Fields of the sparse form's config that describe the dense model, model_type included."""
        dropped = ("model_type", "architectures", "layer_types")
        return {k: v for k, v in config.to_dict().items() if k not in dropped} | {"model_type": self.sparse_form}

    # parts of a layer

    def dense_layer(self, config: Any, layer: int) -> bool:
        """Whether this layer's feed-forward part is one MLP, without experts."""
        return True

    def softmax_router(self, config: Any) -> bool:
        """Whether the router's scores are a softmax without a correction bias, rather than sigmoids with one."""
        return False

    def experts(self, fields: Mapping[str, Any]) -> Experts:
        """The experts of a layer that has them, from the fields of config.json. UserError for a missing field, and for
        more experts of a token than there are.
        """
        routed, per_token = required(fields, self.experts_field), required(fields, "num_experts_per_tok")
        if per_token > routed:
            raise UserError(f"config.json: num_experts_per_tok is {per_token} of {routed} experts; correct the field")
        return Experts(
            routed=routed,
            per_token=per_token,
            width=required(fields, "moe_intermediate_size"),
            shared=fields.get("n_shared_experts") or 0,
            groups=fields.get("n_group") or 1,
            best_groups=fields.get("topk_group") or 1,
            scale=fields.get("routed_scaling_factor", 1.0),
            normalize=bool(fields.get("norm_topk_prob")),
        )

    def mlp_bias(self, config: Any) -> bool:
        """Whether the MLPs of layers without experts have biases."""
        return False

    def biased(self, config: Any) -> tuple[str, ...]:
        """The projections of the attention that have a bias."""
        return ()

    @abstractmethod
    def attention_tensors(self, config: Any) -> Shapes:
        """Tensors on disk below `self_attn.`, the indexer's apart."""

    @abstractmethod
    def entry(self, config: Any) -> Entry:
        """Layout of what attention reads of one token."""

    @abstractmethod
    def rope(self, config: Any) -> tuple[int, bool]:
        """Dims of queries and keys that carry positions, and whether neighbours form the rotated pairs (or halves)."""

    @abstractmethod
    def index_rope(self, config: Any) -> int:
        """Dims of the indexer's queries and keys that carry positions; they come first."""

    def index_source(self, config: Any) -> int:
        """Width of the input of the index queries: the normalized query latent, or the layer's normalized input."""
        return config.hidden_size

    def has_indexer(self, config: Any, layer: int) -> bool:
        """Whether this layer has an indexer.

        A layer of a sparse model without one ("shared" in `indexer_types`) reads the keys that the layer before it
        reads.
        """
        kinds = getattr(config, "indexer_types", None)
        return self.sparse and (kinds is None or kinds[layer] == "full")

    def top_k(self, config: Any) -> tuple[int, ...]:
        """The number of keys that a query selects in each layer of a sparse model."""
        ks = getattr(config, TOP_K_BY_LAYER, None)
        return (config.index_topk,) * config.num_hidden_layers if ks is None else tuple(ks)

    def indexer_tensors(self, config: Any, layer: int) -> Shapes:
        """The indexer's tensors, named as in the published checkpoint; none if the layer has no indexer."""
        if not self.has_indexer(config, layer):
            return {}
        heads, width, hidden = config.index_n_heads, config.index_head_dim, config.hidden_size
        return {
            "indexer.wq_b.weight": (heads * width, self.index_source(config)),
            "indexer.wk.weight": (width, hidden),
            "indexer.k_norm.weight": (width,),
            "indexer.k_norm.bias": (width,),
            "indexer.weights_proj.weight": (heads, hidden),
        }

    # costs, and programs that can run it

    @abstractmethod
    def attention_cost(self, fields: Mapping[str, Any]) -> AttentionCost:
        """Costs of one layer's attention, from the fields of config.json. UserError for a missing field."""

    def index_layers(self, fields: Mapping[str, Any]) -> int:
        """Layers with an indexer, from the fields of config.json."""
        layers, kinds = required(fields, "num_hidden_layers"), fields.get("indexer_types")
        if not self.sparse:
            return 0
        return layers if kinds is None else list(kinds[:layers]).count("full")

    def moe_layers(self, fields: Mapping[str, Any]) -> int:
        """Layers with experts, from the fields of config.json."""
        return 0

    def router_bias(self, fields: Mapping[str, Any]) -> bool:
        """Whether the routers have a correction bias, from the fields of config.json."""
        return False

    def tidy(self, fields: dict[str, Any], mtp: bool) -> dict[str, Any]:
        """The fields of a config.json as they are written. mtp: the multi-token-prediction layer is written too."""
        return fields

    @abstractmethod
    def refusals(self, config: Any) -> list[str]:
        """Reasons why transformers, vLLM or SGLang cannot run such a checkpoint.

        Each begins with the programs that it applies to.
        """


# A field of our own: how many keys a query selects in each layer; their mean is index_topk. None: so many in all.
TOP_K_BY_LAYER = "index_topk_by_layer"

COMMON_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings "
    "index_topk index_n_heads index_head_dim"
).split()


SWITCHES = (
    "attention_bias mlp_bias tie_word_embeddings norm_topk_prob use_sliding_window output_router_logits"
).split()


def required(fields: Mapping[str, Any], name: str) -> int:
    """The number `name` of config.json. UserError if it is missing."""
    value = fields.get(name)
    if value is None:
        raise UserError(f"a config of type {fields.get('model_type')!r} has no {name}; complete its config.json")
    if not isinstance(value, int | float) or not float(value).is_integer():
        raise UserError(f"{name} is {str(value)[:40]!r}; it must be a whole number: correct the config.json")
    return int(value)
