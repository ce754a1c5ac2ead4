"""Memory and time of a training run, before it starts.

Legend: c context (the keys that a query sees, itself included), k selected keys, H query heads.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tokensieve.config import TrainConfig, UserError
from tokensieve.cost.forward import Mode, attention_flops_per_key, forward_flops, index_flops_per_key, visible_keys
from tokensieve.cost.shape import Shape, parameters, shape_of

Stage = Literal["pretrain", "warmup", "adapt"]

# A fused attention backward recomputes the probabilities, so it has five products and the forward has two.
ATTENTION_FORWARD_BACKWARD = 3.5
LINEAR_FORWARD_BACKWARD = 3.0
FROZEN_FORWARD_BACKWARD = 2.0  # a frozen layer passes the gradient on and has none of its own
INDEX_FORWARD_BACKWARD = 2.0  # the indexer's inputs are detached: of its projections only the weights have gradients
SHORTER, LONGER = 0.46, 1.38  # the range around an estimated time, that of the measured runs (docs/results/training.md)
LOGITS = 1 << 29  # the most logits of the output head that are held at a time: 2 GiB in float32


@dataclass(frozen=True)
class Adapters:
    """Adapters (LoRA) that learn in the trunk's place: W + B A, with A and B of width `rank`.

    A linear layer computes B (A x) for each token. Experts' tensors become W + B A, those of all experts, once a pass,
    and then multiply tokens. The gradients of A and B are made of that of W + B A, which costs as much as W's own.
    """

    linear: int  # parameters of the adapters of linear layers
    experts: int = 0  # parameters of the adapters of experts' tensors
    weights: int = 0  # numbers in these tensors W
    layers: int = 0  # layers that have such tensors
    rank: int = 0

    @property
    def parameters(self) -> int:
        return self.linear + self.experts

    def flops(self, context: int, pass_tokens: int) -> tuple[float, float]:
        """FLOPs of a sequence, forward and backward: of B (A x) for each token, and its share of a pass's B A.

        PEFT forms W + B A twice in a forward pass, the first time to check its shape.
        """
        each, once = 2 * self.linear * context, 2 * self.rank * self.weights * context / pass_tokens
        return each + 2 * once, 2 * each + 2 * once

    def sum_bytes(self, weight_bytes: int, value_bytes: int, *, checkpointing: bool) -> int:
        """Peak bytes of experts' W + B A, which the backward pass needs, and of its gradient, which one layer has."""
        one = self.weights // max(1, self.layers)
        return (one if checkpointing else self.weights) * value_bytes + one * weight_bytes


@dataclass(frozen=True)
class Estimate:
    """Needs of a training run: bytes in one process that holds the whole model, FLOPs of all steps, seconds.

    process_bytes: of the process without the model; 0 if the caller has not measured it.
    """

    tokens: int
    flops: float
    seconds: float
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    process_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        model = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes
        return model + self.process_bytes

    def __str__(self) -> str:
        return f"about {self.memory_bytes / 2**30:.1f} GiB and {time_range(self.seconds)} for {self.tokens:,} tokens"


def time_range(seconds: float) -> str:
    """A range around an estimated time, as text: a run took longer or shorter in fewer than one case in ten.

    Source: docs/results/training.md, "Estimates".
    """
    return f"{duration(SHORTER * seconds)} to {duration(LONGER * seconds)}"


def duration(seconds: float) -> str:
    """Seconds in readable units: '45 s', '3 min 20 s', '5 h 12 min', '9 d 4 h'."""
    whole = round(seconds)
    if whole < 60:
        return f"{max(1, whole)} s"
    for limit, unit, size, smaller, small in ((3600, "min", 60, "s", 1), (86400, "h", 3600, "min", 60)):
        if whole < limit:
            return f"{whole // size} {unit} {whole % size // small} {smaller}"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


class TrainFlops(NamedTuple):
    """FLOPs of training: of products with weights, and of all that grows with the keys that a query sees.

    The second are attention, index scores, and the target and gradients of the indexers' loss.
    """

    products: float
    keys: float


def train_flops_parts(
    shape: Shape,
    stage: Stage,
    context: int,
    adapters: Adapters | None = None,
    kl_every: int = 1,
    pass_tokens: int | None = None,
) -> TrainFlops:
    """The parts of `train_flops`, which has the same arguments."""
    counts = parameters(shape)
    visible = visible_keys(context)
    index_linear = 2 * counts.indexer_matmul * context
    if stage == "warmup":
        trunk = 2 * counts.matmul * context
        attention = shape.layers * visible * attention_flops_per_key(shape, "mha")
        target = 2 * shape.attention.heads * shape.attention.score
        scoring = index_flops_per_key(shape) + index_gradient_flops_per_key(shape)
        loss = shape.layers * visible * (target + scoring) / kl_every
        taught = index_linear * shape.layers / max(1, shape.index_layers)
        return TrainFlops(trunk + INDEX_FORWARD_BACKWARD * taught, attention + loss)
    own = LINEAR_FORWARD_BACKWARD if adapters is None else FROZEN_FORWARD_BACKWARD
    linear = 2 * own * (counts.matmul + counts.head) * context
    if adapters is not None:
        routed = adapters.weights * shape.experts_per_token / max(1, shape.experts)  # the weights that a token meets
        linear += 2 * (LINEAR_FORWARD_BACKWARD - own) * routed * context
        linear += sum(adapters.flops(context, pass_tokens or context))
    if stage == "pretrain":
        attention = visible * attention_flops_per_key(shape, "mha")
        return TrainFlops(linear, ATTENTION_FORWARD_BACKWARD * shape.layers * attention)
    selected = visible_keys(context, top_k=shape.top_k)
    attention = selected * attention_flops_per_key(shape, "mqa")
    selecting = shape.index_layers * visible * index_flops_per_key(shape)
    scoring = 2 * selected * index_flops_per_key(shape) + selected * index_gradient_flops_per_key(shape)
    keys = ATTENTION_FORWARD_BACKWARD * shape.layers * attention + selecting + shape.layers * scoring / kl_every
    return TrainFlops(linear + INDEX_FORWARD_BACKWARD * index_linear, keys)


def recomputed_flops(shape: Shape, stage: Stage, context: int) -> TrainFlops:
    """FLOPs of a sequence that activation checkpointing adds: every layer's forward pass, without the output head.

    A warm-up has no backward pass through layers, and so nothing to recompute.
    """
    if stage == "warmup":
        return TrainFlops(0.0, 0.0)
    sparse, counts = stage == "adapt", parameters(shape)
    mode: Mode = "mqa" if sparse else "mha"
    products = 2.0 * (counts.matmul + (counts.indexer_matmul if sparse else 0)) * context
    return TrainFlops(products, forward_flops(shape, context, sparse=sparse, logits=0, mode=mode) - products)


def train_flops(
    shape: Shape,
    stage: Stage,
    context: int,
    adapters: Adapters | None = None,
    kl_every: int = 1,
    pass_tokens: int | None = None,
) -> float:
    """FLOPs of one training sequence of `context` tokens, forward and backward, without recomputation of whole layers.

    pretrain: all parameters train, attention is dense (dense adaptation costs the same). The linear layers count three
    times, attention three and a half times.
    warmup: the trunk runs forward, without the output head, and its probabilities are computed once more for the
    target. The indexer's projections run forward and get their weights' gradients. Index scores and both their
    gradients are computed once, in one pass. A layer without an indexer costs as much, since it teaches the one that it
    shares.
    adapt: as pretrain, but attention reads the selected keys, always in MQA form, whatever the context. Index scores of
    every key are computed once to select; those of the selected keys for the loss and again in its backward pass, with
    both gradients.
    kl_every: target and scores, and their gradients, are those of every so many queries, in warmup and adapt.

    adapters: those that learn in the trunk's place; None: none do. pass_tokens: tokens of a forward and backward pass,
    which share what the adapters compute once; None: those of the sequence.
    """
    return sum(train_flops_parts(shape, stage, context, adapters, kl_every, pass_tokens))


def index_gradient_flops_per_key(shape: Shape) -> int:
    """FLOPs of the gradients of one index score of one layer by its query and by its key.

    Each is a product of width d_I per head.
    """
    return 2 * 2 * shape.index_heads * shape.index_dim


def attention_values(shape: Shape) -> int:
    """Numbers per token that attention keeps for its backward pass: inputs of norms and products, heads around RoPE.

    Those of its indexer are counted apart, by `index_values`.
    """
    return 3 * shape.hidden + shape.attention.kept


def ffn_values(shape: Shape, moe: bool) -> int:
    """Numbers per token that a feed-forward layer keeps for its backward pass."""
    if not moe:
        return 2 * shape.hidden + 4 * shape.dense_ffn
    expanded = 4 * shape.expert_ffn * (shape.experts_per_token + shape.shared_experts)
    return 2 * shape.hidden * (1 + shape.experts_per_token) + expanded + shape.experts


def index_values(shape: Shape) -> int:
    """Numbers per token that one indexer keeps for its backward pass."""
    return 2 * (shape.index_heads + 1) * shape.index_dim + shape.index_heads


def head_rows(vocabulary: int) -> int:
    """Tokens whose logits training holds at a time. For 128K tokens and a vocabulary of 100K all would be 54 GB."""
    return max(1, LOGITS // vocabulary)


def logits_bytes(shape: Shape, stage: Stage, tokens: int) -> int:
    """Bytes of logits and of their gradient, float32, for at most `head_rows` tokens; a warm-up has none."""
    return 0 if stage == "warmup" else 2 * 4 * shape.vocabulary * min(tokens, head_rows(shape.vocabulary))


def warmup_values(shape: Shape, shared: bool) -> int:
    """Numbers per token at the peak of a layer of a warm-up, which keeps nothing for a backward pass through it.

    Either attention holds most: queries, under MLA before and after their rotation, keys and values of all heads, these
    as wide as keys, and the output in this width and in its own. Or the experts: a token's copies, as they go in and
    come out, in the tokens' order, and weighted; before that their inner numbers. Beside them the residual stream is
    there up to seven times: from the embedding in float32, and before and after each part.

    shared: by the GPUs of a context. Attention then adds up parts of the output in float32
    (`tokensieve/ops/fused.py`), and keys and values are not a token's own: they are counted apart.
    """
    attention, hidden = shape.attention, shape.hidden
    latent, value = attention.gathered != attention.masked, attention.masked - attention.score
    per_head = 2 * attention.masked + 4 * attention.score * latent
    if shared:
        queries = 2 * attention.score + attention.rotated if latent else attention.score
        per_head = queries + 4 * attention.score + 8 * value
    attending = attention.heads * per_head + attention.cached + index_values(shape)
    if latent:
        attending += 2 * attention.index_source
    ffn = 3 * shape.dense_ffn if shape.moe_layers < shape.layers else 0
    if shape.moe_layers:
        inner = shape.expert_ffn
        routed = shape.experts_per_token * max(4 * hidden, 2 * hidden + 3 * inner, hidden + 4 * inner)
        ffn = max(ffn, routed, hidden + 3 * shape.shared_experts * inner)
    return max(5 * hidden + attending, 7 * hidden + ffn)


def activation_bytes(
    shape: Shape, stage: Stage, tokens: int, value_bytes: int, *, checkpointing: bool, shared: bool = False
) -> int:
    """Peak bytes of the activations of a micro-batch of `tokens` tokens, without the blocks of attention.

    warmup holds one layer (`warmup_values`), whatever the depth: no gradient goes through it. Checkpointing keeps every
    layer's input and one whole layer. Logits are those of `logits_bytes`; the selected indices are int32. shared: as
    in `warmup_values`.
    """
    if stage == "warmup":
        return tokens * value_bytes * warmup_values(shape, shared)
    dense_layers, index = shape.layers - shape.moe_layers, index_values(shape)
    ffn = max(ffn_values(shape, moe) for moe, count in ((True, shape.moe_layers), (False, dense_layers)) if count)
    attention = attention_values(shape)
    logits = logits_bytes(shape, stage, tokens)
    if checkpointing:
        held = shape.index_layers if shape.index_layers < shape.layers else 1  # borrowed indices are a layer's inputs
        values = shape.layers * shape.hidden + attention + ffn + index
        return tokens * (value_bytes * values + held * 4 * shape.top_k) + logits
    values = shape.moe_layers * ffn_values(shape, True) + dense_layers * ffn_values(shape, False)
    values += shape.layers * attention + shape.index_layers * index
    return tokens * (value_bytes * values + shape.index_layers * 4 * shape.top_k) + logits


def train_estimate(
    config: Any,
    stage: Stage,
    *,
    tokens_per_step: int,
    steps: int,
    context: int,
    flops_per_second: float,
    micro_batch_tokens: int | None = None,
    weight_bytes: int = 4,
    value_bytes: int = 4,
    checkpointing: bool = False,
    adapters: Adapters | None = None,
    kl_every: int = 1,
) -> Estimate:
    """Memory and time of a training run, before it starts.

    context: length in tokens of a packed row. One document is assumed to fill it, so the estimate is an upper bound.
    flops_per_second: speed of the device on such work, as measured by the caller (nothing here touches a device).
    micro_batch_tokens: tokens of one forward and backward pass (None: the whole step). weight_bytes: of a stored
    parameter and of its gradient. value_bytes: of an activation (2 under bf16 autocast, which also keeps a copy of the
    weights). The optimizer is Adam with two float32 moments for each trainable parameter; in warmup only the indexer's
    are trainable. adapters: those that train in the trunk's place (LoRA); in adapt a frozen copy of the indexers is
    kept then. kl_every: warmup has a KL at every so many queries. Raises UserError if a number is below 1, or if a
    stage trains the indexer and the model has none.
    """
    numbers = {
        "tokens_per_step": tokens_per_step,
        "steps": steps,
        "context": context,
        "flops_per_second": flops_per_second,
    }
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{name} is {number}: it must be at least 1")
    shape = shape_of(config)
    if stage != "pretrain" and not shape.sparse:
        raise UserError(f"{stage} needs a model with an indexer: run `tokensieve sparsify` on this one first")
    counts = parameters(shape)
    weights = counts.total - (counts.indexer if stage == "pretrain" else 0)
    trainable = counts.indexer if stage == "warmup" else weights
    if adapters is not None:
        trainable = adapters.parameters + (counts.indexer if stage == "adapt" else 0)
        weights += trainable
    copies = value_bytes if value_bytes < weight_bytes else 0
    pass_tokens = micro_batch_tokens or tokens_per_step
    sequence = train_flops(shape, stage, context, adapters, kl_every, pass_tokens)
    activations = activation_bytes(shape, stage, pass_tokens, value_bytes, checkpointing=checkpointing)
    if adapters is not None:
        activations += adapters.sum_bytes(weight_bytes, value_bytes, checkpointing=checkpointing)
    if checkpointing:
        sequence += sum(recomputed_flops(shape, stage, context))
        sequence += 0 if adapters is None else adapters.flops(context, pass_tokens)[0]
    flops = sequence * tokens_per_step * steps / context
    return Estimate(
        tokens=tokens_per_step * steps,
        flops=flops,
        seconds=flops / flops_per_second,
        weight_bytes=weights * (weight_bytes + copies),
        gradient_bytes=trainable * weight_bytes,
        optimizer_bytes=trainable * 8,
        activation_bytes=activations,
    )


def phase_estimates(
    model_config: Any,
    run: TrainConfig,
    flops_per_second: float,
    *,
    value_bytes: int = 4,
    adapters: Adapters | None = None,
) -> list[Estimate]:
    """Memory and time of each phase of a configured run; arguments and errors as in `run_estimate`."""
    if not run.phases:
        raise UserError("the run has no phases: give at least one [[phases]] table")
    return [
        train_estimate(
            model_config,
            "pretrain" if run.stage == "adapt" and not run.selection else run.stage,
            tokens_per_step=phase.sequences * phase.context,
            steps=phase.steps,
            context=phase.context,
            flops_per_second=flops_per_second,
            micro_batch_tokens=phase.micro_batch * phase.context,
            value_bytes=value_bytes,
            checkpointing=run.activation_checkpointing,
            adapters=adapters,
            kl_every=run.kl_every,
        )
        for phase in run.phases
    ]


def run_estimate(
    model_config: Any,
    run: TrainConfig,
    flops_per_second: float,
    *,
    value_bytes: int = 4,
    adapters: Adapters | None = None,
) -> Estimate:
    """Memory and time of a configured run: the sum of its phases' times, the peak of their memory.

    model_config: the config of the model to train. Adaptation without selection costs as much as pretraining.
    flops_per_second, value_bytes and adapters as in train_estimate. Raises UserError as train_estimate does.
    """
    phases = phase_estimates(model_config, run, flops_per_second, value_bytes=value_bytes, adapters=adapters)
    return dataclasses.replace(
        max(phases, key=lambda phase: phase.memory_bytes),
        tokens=sum(phase.tokens for phase in phases),
        flops=sum(phase.flops for phase in phases),
        seconds=sum(phase.seconds for phase in phases),
    )
