"""Memory of one GPU in training, on one GPU or under FSDP2, context and expert parallelism, in bytes.

What lasts from step to step (weights, gradients, moments) is divided over all GPUs, and may be in the memory of the
host instead. What a step needs besides is not:
the layers that are gathered at a time, and the activations of the tokens that a GPU computes. Under context parallelism
a GPU has the entries and index keys of a whole sequence, one layer at a time.

Legend: N tokens of a micro-batch that a GPU computes, T tokens of its sequences.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from tokensieve.cost.shape import Shape, parameters
from tokensieve.cost.training import Adapters, Stage, activation_bytes, logits_bytes

WEIGHT, VALUE, MOMENTS = 4, 2, 8  # bytes: of a parameter or its gradient, of an activation, of Adam's two moments
GATHERED = VALUE  # bytes of a parameter in a layer that is gathered from all GPUs
LAYERS = 2  # gathered at a time: the one that runs, and the next one, which is on its way
STRIP = 1 << 26  # entries of the warm-up's target, and of its scores, held at a time (tokensieve/ops/triton/loss.py)
SCORES = 1 << 28  # index scores, or kept probabilities and slopes, held at a time in adaptation (ops/triton/topk.py)
ACTIVATIONS = "activations"

Origin = Literal["counted", "estimated"]


@dataclass(frozen=True)
class Ranks:
    """The GPUs of a run. context: those that share a sequence. experts: those that divide the routed experts."""

    gpus: int
    context: int = 1
    experts: int = 1

    @property
    def shards(self) -> int:
        """Groups that read different sequences."""
        return self.gpus // self.context


@dataclass(frozen=True)
class Held:
    """Bytes of one GPU's memory. origin: "counted" if they follow from sizes, "estimated" for activations and copies.

    Of these only the large ones are known.
    """

    name: str
    bytes: int
    origin: Origin


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one layer, its indexer included. experts: those of routed experts.

    exact: those that are read in float32 (`tokensieve/train/precision.py`): of the router, and of the indexer its head
    weights and key norm. They are gathered once a pass, for all layers.
    """

    other: int
    exact: int
    experts: int = 0

    def held(self, ranks: Ranks) -> int:
        """Number of parameters that a GPU has while the layer is gathered."""
        return self.other + self.experts // ranks.experts


def layer_parameters(shape: Shape) -> tuple[LayerParameters, ...]:
    """Parameters of a layer of each kind that the model has, with experts and without."""
    counts, attention = parameters(shape), shape.attention
    indexer = counts.indexer // max(1, shape.index_layers)
    weighing = _weighing(shape)
    fixed = attention.weights + attention.norms + 2 * shape.hidden + indexer - weighing
    expert = 3 * shape.hidden * shape.expert_ffn
    kinds = []
    if shape.moe_layers:
        exact = weighing + shape.hidden * shape.experts
        kinds.append(LayerParameters(fixed + shape.shared_experts * expert, exact, shape.experts * expert))
    if shape.layers > shape.moe_layers:
        bias = (2 * shape.dense_ffn + shape.hidden) * shape.mlp_bias
        kinds.append(LayerParameters(fixed + 3 * shape.hidden * shape.dense_ffn + bias, weighing))
    return tuple(kinds)


def _weighing(shape: Shape) -> int:
    """Parameters of an indexer that are read in float32: its head weights and key norm."""
    return shape.hidden * shape.index_heads + 2 * shape.index_dim


def tables(shape: Shape) -> int:
    """Parameters of embedding and head. They are gathered once a micro-batch, and stay."""
    return parameters(shape).head * (1 if shape.tied else 2)


def exact(shape: Shape) -> int:
    """Parameters that are read in float32: of routers, head weights and key norms. They are gathered as the tables."""
    return shape.index_layers * _weighing(shape) + shape.moe_layers * shape.hidden * shape.experts


def trained(shape: Shape, stage: Stage, adapters: Adapters | None = None) -> int:
    """Number of parameters that learn in a stage. adapters: those that do in the trunk's place."""
    counts = parameters(shape)
    if adapters is not None:
        return adapters.parameters + (counts.indexer if stage == "adapt" else 0)
    return counts.indexer if stage == "warmup" else counts.total - (counts.indexer if stage == "pretrain" else 0)


def stored(shape: Shape, stage: Stage, adapters: Adapters | None = None) -> int:
    """Number of parameters; beside adapters, the indexers that learn are copies of those that are there."""
    return parameters(shape).total + (0 if adapters is None else trained(shape, stage, adapters))


def lasting(shape: Shape, stage: Stage, ranks: Ranks, adapters: Adapters | None = None) -> list[Held]:
    """One GPU's part of what lasts from step to step."""
    learning = trained(shape, stage, adapters)
    return [
        Held("weights, float32", WEIGHT * stored(shape, stage, adapters) // ranks.gpus, "counted"),
        Held("gradients, float32", WEIGHT * learning // ranks.gpus, "counted"),
        Held("moments of Adam, float32", MOMENTS * learning // ranks.gpus, "counted"),
    ]


def host_memory(shape: Shape, stage: Stage, ranks: Ranks, adapters: Adapters | None = None) -> list[Held]:
    """Memory of the host for one GPU whose part of what lasts is there, while a checkpoint is written.

    All of it is estimated: each pinned tensor takes the next power of two of its bytes, less than twice as much. Of
    adapters the merged model at the end is more than any checkpoint.
    """
    copied = WEIGHT * parameters(shape).total + (0 if adapters else MOMENTS * trained(shape, stage))
    copy = Held("copy of a checkpoint, float32", copied // ranks.gpus, "estimated")
    return [*(replace(held, origin="estimated") for held in lasting(shape, stage, ranks, adapters)), copy]


def memory(
    shape: Shape,
    stage: Stage,
    ranks: Ranks,
    *,
    sequences: int,
    context: int,
    checkpointing: bool,
    offload: bool = False,
    adapters: Adapters | None = None,
) -> list[Held]:
    """Memory of one GPU at the peak of a step. sequences: of a micro-batch, of `context` tokens each.

    offload: what lasts is in the host's memory (`host_memory`). adapters: those that learn in the trunk's place.
    """
    T = sequences * context
    N = T // ranks.context
    logits = logits_bytes(shape, stage, N)
    shared = ranks.context > 1
    activations = activation_bytes(shape, stage, N, VALUE, checkpointing=checkpointing, shared=shared) - logits
    if adapters is not None:
        made = WEIGHT if ranks.gpus == 1 else GATHERED  # of a gradient
        activations += adapters.sum_bytes(made, VALUE, checkpointing=checkpointing)
    return [
        *([] if offload else lasting(shape, stage, ranks, adapters)),
        *_gathered_layers(shape, stage, ranks, checkpointing, adapters, offload),
        Held(ACTIVATIONS, activations, "estimated"),
        *_gathered_keys(shape, stage, ranks, N, T, checkpointing),
        Held("buffers of scores and of the KL's target", _buffers(stage, N, T), "counted"),
        Held("logits, float32", logits, "counted"),
    ]


def _gathered_layers(
    shape: Shape, stage: Stage, ranks: Ranks, checkpointing: bool, adapters: Adapters | None, offload: bool
) -> Iterator[Held]:
    """Whole layers as FSDP gathers them, and their gradients; on one GPU the bfloat16 copies that products read.

    Layers that share an indexer are gathered together. Embedding and head stay gathered for the whole step, and so do
    the parameters that are read in float32. A gradient is there twice: as it was made, and in float32 as it is sent. On
    one GPU autocast keeps the copies of linear layers that learn to the end of the forward pass, and without
    recomputation the backward pass needs them all. Adapters learn in their layer's place, and it has no gradient. With
    offload a GPU's part of the sum is there too, on its way to the host.
    """
    counts, learns = parameters(shape), stage != "warmup"
    largest = max(layer_parameters(shape), key=lambda kind: kind.held(ranks))
    if ranks.gpus == 1:
        copied = max(largest.held(ranks), counts.head if learns else 0)
        if learns:
            routed = shape.moe_layers * shape.experts * 3 * shape.hidden * shape.expert_ffn
            copied = (
                counts.total - (tables(shape) - counts.head) - routed + (largest.experts if checkpointing else routed)
            )
        yield Held("weights in bfloat16, for products", VALUE * copied, "estimated")
        return
    together = -(-shape.layers // shape.index_layers) if shape.index_layers else 1
    unit = together * largest.held(ranks)
    learning, learning_tables = unit, tables(shape)
    if adapters is not None:
        learning, learning_tables = together * trained(shape, stage, adapters) // shape.layers, 0
        unit += learning
    gathered = GATHERED * (LAYERS * unit + tables(shape)) + WEIGHT * exact(shape)
    yield Held("gathered layers, embedding and head", gathered, "counted")
    made = GATHERED * (learning + learning_tables) + WEIGHT * exact(shape)
    sent = WEIGHT * max(learning, learning_tables, exact(shape))
    received = sent // ranks.gpus if offload else 0
    yield Held("their gradients", made + sent + received if learns else 0, "counted")


def _gathered_keys(shape: Shape, stage: Stage, ranks: Ranks, N: int, T: int, checkpointing: bool) -> Iterator[Held]:
    """Entries and index keys of whole sequences: as they arrive, in their order, and the gradients that are sent back.

    Dense attention makes keys and values per head of all T tokens, and copies. In pretraining a GPU's own are counted
    with the activations. Of a warm-up copies of as many as the GPU has tokens are, and here those of up to half of the
    keys, for the largest level of `tokensieve/ops/scattered.py`. Without recomputation every layer keeps all.
    """
    if ranks.context == 1:
        return
    attention = shape.attention
    sent = attention.cached + (shape.index_dim if stage != "pretrain" else 0)
    layers = 1 if checkpointing or stage == "warmup" else shape.layers
    gradient = WEIGHT + VALUE if stage != "warmup" else 0  # summed in float32, sent in bfloat16
    size = T * sent * (VALUE * (1 + layers) + gradient)
    made, copied = expanded(shape)
    if stage == "pretrain":
        size += (T - N) * (made + copied) * VALUE * (layers + 1)
    if stage == "warmup":
        level = max(0, T // 2 - N) * attention.heads * (attention.score + attention.masked)  # values before and after
        size += VALUE * (T * made + level)
    yield Held("gathered keys and values, index keys", size, "estimated")


def expanded(shape: Shape) -> tuple[int, int]:
    """Numbers per token of the keys and values of all heads that dense attention makes of the entries, and of copies.

    Under MLA: the up-projected latent, and keys with their rotated part; values as wide as keys. Grouped ones are read
    as they are, and repeated for the heads of their group.
    """
    attention = shape.attention
    if attention.gathered != attention.masked:
        made = attention.masked - attention.rotated + attention.score
        return attention.heads * made, attention.heads * attention.score
    return 0, attention.heads * attention.masked


def _buffers(stage: Stage, N: int, T: int) -> int:
    if stage == "pretrain":
        return 0
    return 4 * (2 * min(STRIP, N * T) if stage == "warmup" else min(SCORES, N * T))
