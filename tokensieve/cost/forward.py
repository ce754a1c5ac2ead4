"""FLOPs of a forward pass and bytes that decoding reads.

A multiplication and an addition are two FLOPs. Norms, RoPE, softmax and the router's sigmoid are not counted: they are
below one percent at every published size.

Legend: c context (the keys that a query sees, itself included), k selected keys, H query heads.
"""

from dataclasses import dataclass
from typing import Literal

from tokensieve.config import UserError
from tokensieve.cost.shape import Shape, parameters

Mode = Literal["mha", "mqa"]
Layout = Literal["fp8", "bf16", "float32"]

VALUE_BYTES = {"bf16": 2, "float32": 4}
FP8_BLOCK = 128  # values that share one float32 scale; of a matrix FP8_BLOCK x FP8_BLOCK
MATRIX_BYTES = {"fp8": 1 + 4 / FP8_BLOCK**2, "bf16": 2, "float32": 4}  # a weight of attention, feed-forward or experts
PLAIN_BYTES = {"fp8": 2, "bf16": 2, "float32": 4}  # one of norms, biases, routers, embedding and output head
ROPE_BYTES = 2  # the rotated part of a key stays in bf16 beside FP8 latents


@dataclass(frozen=True)
class TwoLevel:
    """Selection in two levels (HISA, arXiv 2603.28458): the best `blocks` blocks of `width` keys by their means, then
    the best keys of these blocks. UserError if either is below 1.
    """

    blocks: int
    width: int

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.width < 1:
            raise UserError(f"two levels of {self.blocks} blocks of {self.width} keys; both must be at least 1")


def visible_keys(tokens: int, start: int = 0, top_k: int = 0) -> int:
    """Keys read by all queries at positions start ... start + tokens - 1 together: min(c, k) each, or c if k = 0."""

    def total(n: int) -> int:
        if not top_k or n <= top_k:
            return n * (n + 1) // 2
        return top_k * (top_k + 1) // 2 + (n - top_k) * top_k

    return total(start + tokens) - total(start)


def attention_flops_per_key(shape: Shape, mode: Mode) -> int:
    """FLOPs of one query token and one key over all heads of one layer: the score and the weighted value.

    Under MLA, mha up-projects keys (width nope + rope) and values; mqa absorbs the up-projections into query and
    output, so that the key is [latent, rope] and the value the latent.
    """
    if mode == "mha":
        return 2 * shape.attention.heads * shape.attention.masked
    return 2 * shape.attention.heads * shape.attention.gathered


def index_flops_per_key(shape: Shape) -> int:
    """FLOPs of one index score of one layer, the weighted sum of H_I products of width d_I (equation 1)."""
    return 2 * shape.index_heads * (shape.index_dim + 1)


def scored_keys(context: int, two_level: TwoLevel | None = None) -> int:
    """Index scores of one query over `context` keys in a layer with an indexer, those of blocks' means included."""
    if two_level is None or context <= two_level.blocks * two_level.width:
        return context
    return -(-context // two_level.width) + two_level.blocks * two_level.width


def forward_flops(
    shape: Shape,
    tokens: int,
    start: int = 0,
    *,
    mode: Mode | None = None,
    sparse: bool | None = None,
    logits: int | None = None,
) -> float:
    """FLOPs of a forward pass over `tokens` queries of one sequence after `start` cached tokens; decode is tokens=1.

    sparse: None for the model as it is; False for the same model with dense attention, without its indexer.
    mode: how attention is computed. None for the form that runs: MHA for dense prefill, MQA for one token, and for
    sparse prefill the cheaper of MQA over the selected keys and masked MHA over all of them.
    logits: number of positions that go through the output head (None: all).
    """
    sparse = shape.sparse if sparse is None else sparse
    counts = parameters(shape)
    linear = 2 * counts.matmul * tokens + 2 * counts.head * (tokens if logits is None else logits)
    visible = visible_keys(tokens, start)
    selected = visible_keys(tokens, start, shape.top_k) if sparse else visible
    mha, mqa = visible * attention_flops_per_key(shape, "mha"), selected * attention_flops_per_key(shape, "mqa")
    if mode is None:
        mode = "mqa" if tokens == 1 or (sparse and mqa < mha) else "mha"
    attention = shape.layers * (mha if mode == "mha" else mqa)
    scores = shape.index_layers * visible * index_flops_per_key(shape)
    index = 2 * counts.indexer_matmul * tokens + scores if sparse else 0
    return float(linear + attention + index)


def latent_bytes(shape: Shape, layout: Layout) -> int:
    """Bytes of one token's entry in the cache of one layer: 656 in FP8 and 1152 in bf16 for the 671B model."""
    if layout == "fp8":
        plain = shape.attention.cached - shape.attention.rotated
        return plain + 4 * -(-plain // FP8_BLOCK) + ROPE_BYTES * shape.attention.rotated
    return VALUE_BYTES[layout] * shape.attention.cached


def index_bytes(shape: Shape, layout: Layout) -> int:
    """Bytes of one token's index key in a layer with an indexer: 132 in FP8 for the 671B model, 0 for a dense model."""
    if layout == "fp8":
        return shape.index_dim + 4 * -(-shape.index_dim // FP8_BLOCK)
    return VALUE_BYTES[layout] * shape.index_dim


def cache_bytes_per_token(shape: Shape, layout: Layout) -> int:
    """Bytes that one token occupies in the caches of all layers."""
    return shape.layers * latent_bytes(shape, layout) + shape.index_layers * index_bytes(shape, layout)


def kv_read_fraction(context: int, top_k: int) -> float:
    """Share of the KV entries visible at `context` that sparse attention reads: min(k, c) / c.

    Raises UserError if either is below 1.
    """
    if context < 1 or top_k < 1:
        raise UserError(f"context ({context}) and k ({top_k}) must be at least 1")
    return min(top_k, context) / context


def decode_cache_bytes(shape: Shape, context: int, layout: Layout, *, sparse: bool | None = None) -> int:
    """Bytes of cache that one decoded token reads in all layers.

    Dense attention reads every entry. Sparse attention reads k entries and every index key; as long as c <= k it
    selects everything and reads no index key.
    """
    sparse = shape.sparse if sparse is None else sparse
    latent = latent_bytes(shape, layout)
    if not sparse or context <= shape.top_k:
        return shape.layers * context * latent
    return shape.layers * shape.top_k * latent + shape.index_layers * context * index_bytes(shape, layout)


def read_experts(shape: Shape, tokens: float) -> float:
    """The expected number of distinct routed experts that `tokens` tokens meet in a layer with experts.

    Routing is assumed uniform and independent: E (1 - (1 - e / E)^tokens) of E experts, with e per token.
    """
    return shape.experts * (1 - (1 - shape.experts_per_token / shape.experts) ** tokens) if shape.experts else 0.0


def stored_bytes(number: Layout, matrices: float = 0, plain: float = 0, float32: float = 0) -> float:
    """Bytes of weights whose format is `number`, as checkpoints store them and models hold them.

    matrices: those of attention, feed-forward layers, experts and the indexer's wq_b and wk, which FP8 holds in blocks.
    plain: norms, biases, routers, embedding and head, which stay in bf16. float32: the routers' correction biases and
    the indexer's weights_proj, in every format.
    """
    return MATRIX_BYTES[number] * matrices + PLAIN_BYTES[number] * plain + 4 * float32


def index_weight_bytes(shape: Shape, number: Layout) -> float:
    """Bytes of the indexers' projections."""
    counts = parameters(shape)
    return stored_bytes(number, counts.indexer_matmul - counts.head_weights, 0, counts.head_weights)


def decode_weight_bytes(shape: Shape, batch: float, number: Layout) -> float:
    """Bytes of the matrices that one decode step of `batch` tokens reads, experts by `read_experts`; norms and biases
    are not counted.
    """
    counts, expert = parameters(shape), 3 * shape.hidden * shape.expert_ffn
    experts = shape.moe_layers * (read_experts(shape, batch) - shape.experts_per_token) * expert
    others = stored_bytes(number, counts.matmul - counts.router + experts, counts.router + counts.head)
    return others + index_weight_bytes(shape, number)
