"""Memory and time of a training run, before it starts.

Legend: c context (the keys that a query sees, itself included), k selected keys, H query heads.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from tokensieve.config import TrainConfig, UserError
from tokensieve.cost.forward import Mode, attention_flops_per_key, forward_flops, index_flops_per_key, visible_keys
from tokensieve.cost.shape import Shape, parameters, shape_of

Stage = Literal["pretrain", "warmup", "adapt"]

# A fused attention backward recomputes the probabilities: five products where the forward has two.
ATTENTION_FORWARD_BACKWARD = 3.5
LINEAR_FORWARD_BACKWARD = 3.0
INDEX_FORWARD_BACKWARD = 2.0  # the indexer's inputs are detached: its projections have no gradient but their weights'
LOGITS = 1 << 29  # of the output head, held at a time: 2 GiB in float32


@dataclass(frozen=True)
class Estimate:
    """What a training run will need: bytes in one process that holds the whole model, FLOPs of all steps, seconds."""

    tokens: int
    flops: float
    seconds: float
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def memory_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes

    def __str__(self) -> str:
        return f"about {self.memory_bytes / 2**30:.1f} GiB and {duration(self.seconds)} for {self.tokens:,} tokens"


def duration(seconds: float) -> str:
    """Seconds for a reader: '45 s', '3 min 20 s', '5 h 12 min', '9 d 4 h'."""
    whole = round(seconds)
    if whole < 60:
        return f"{max(1, whole)} s"
    for limit, unit, size, smaller, small in ((3600, "min", 60, "s", 1), (86400, "h", 3600, "min", 60)):
        if whole < limit:
            return f"{whole // size} {unit} {whole % size // small} {smaller}"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def train_flops(shape: Shape, stage: Stage, context: int) -> float:
    """FLOPs of one training sequence of `context` tokens, forward and backward, without recomputation of whole layers.

    pretrain: all parameters, dense attention (dense adaptation costs the same): the linear layers three times,
    attention three and a half times.
    warmup: the trunk forward, without the output head; its probabilities once more for the target; the indexer's
    projections forward and their weights' gradients; index scores and both their gradients once, in one pass.
    adapt: as pretrain with attention over the selected keys, always in MQA form, whatever the context; index scores of
    every key once to select, and of the selected ones for the loss, again in its backward pass, and both gradients.
    """
    counts = parameters(shape)
    every = visible_keys(context)
    index_linear = 2 * counts.indexer_matmul * context
    if stage == "warmup":
        trunk = forward_flops(shape, context, sparse=False, logits=0)
        target = shape.layers * every * 2 * shape.attention.heads * shape.attention.score
        scored = index_flops_per_key(shape) + index_gradient_flops_per_key(shape)
        index = INDEX_FORWARD_BACKWARD * index_linear + shape.layers * every * scored
        return trunk + target + index
    linear = LINEAR_FORWARD_BACKWARD * 2 * (counts.matmul + counts.head) * context
    if stage == "pretrain":
        attention = every * attention_flops_per_key(shape, "mha")
        return linear + ATTENTION_FORWARD_BACKWARD * shape.layers * attention
    chosen = visible_keys(context, top_k=shape.top_k)
    attention = chosen * attention_flops_per_key(shape, "mqa")
    scored = (every + 2 * chosen) * index_flops_per_key(shape) + chosen * index_gradient_flops_per_key(shape)
    index = INDEX_FORWARD_BACKWARD * index_linear + shape.layers * scored
    return linear + ATTENTION_FORWARD_BACKWARD * shape.layers * attention + index


def index_gradient_flops_per_key(shape: Shape) -> int:
    """FLOPs of the gradients of one index score of one layer by its query and by its key: a product of width d_I a head each."""
    return 2 * 2 * shape.index_heads * shape.index_dim


def layer_values(shape: Shape, moe: bool) -> int:
    """Numbers per token that one layer keeps for its backward: inputs of norms and products, heads around RoPE."""
    ffn = 4 * shape.dense_ffn
    if moe:
        ffn = 4 * shape.expert_ffn * (shape.experts_per_token + shape.shared_experts)
        ffn += 2 * shape.hidden * shape.experts_per_token + shape.experts
    index = 2 * (shape.index_heads + 1) * shape.index_dim + shape.index_heads
    return 5 * shape.hidden + shape.attention.kept + ffn + index


def head_rows(vocabulary: int) -> int:
    """Tokens whose logits training holds at a time: of 128K tokens and a vocabulary of 100K they would be 54 GB."""
    return max(1, LOGITS // vocabulary)


def activation_bytes(shape: Shape, stage: Stage, tokens: int, value_bytes: int, *, checkpointing: bool) -> int:
    """Bytes that the activations of a micro-batch of `tokens` tokens occupy at the peak; blocks of attention apart.

    warmup keeps one layer, whatever the depth. Checkpointing keeps every layer's input and one whole layer. The logits
    and their gradient are float32, of `head_rows` tokens at most; the selected indices are int32.
    """
    moe_values, dense_values = layer_values(shape, True), layer_values(shape, False)
    dense_layers = shape.layers - shape.moe_layers
    widest = max(moe_values if shape.moe_layers else 0, dense_values if dense_layers else 0)
    if stage == "warmup":
        return tokens * value_bytes * (widest + shape.hidden)
    logits = 2 * 4 * shape.vocabulary * min(tokens, head_rows(shape.vocabulary))
    if checkpointing:
        return tokens * (value_bytes * (shape.layers * shape.hidden + widest) + 4 * shape.top_k) + logits
    values = shape.moe_layers * moe_values + dense_layers * dense_values
    return tokens * (value_bytes * values + shape.layers * 4 * shape.top_k) + logits


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
) -> Estimate:
    """Memory and time of a training run, before it starts.

    context: length in tokens of a packed row; documents inside it are taken to fill it, so this is the upper end.
    flops_per_second: what the device reaches on such work, as the caller measured it (nothing here touches a device).
    micro_batch_tokens: tokens of one forward and backward (None: the whole step). weight_bytes: of a stored parameter
    and of its gradient; value_bytes: of an activation (2 under bf16 autocast, which also keeps a copy of the weights).
    The optimizer is Adam with two float32 moments for each trainable parameter: in warmup the indexer's alone.
    Raises UserError where a number is below 1 or a stage that trains the indexer meets a model without one.
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
    held = counts.total - (counts.indexer if stage == "pretrain" else 0)
    trainable = counts.indexer if stage == "warmup" else held
    copies = value_bytes if value_bytes < weight_bytes else 0
    sequence = train_flops(shape, stage, context)
    if checkpointing and stage != "warmup":
        mode: Mode = "mqa" if stage == "adapt" else "mha"
        sequence += forward_flops(shape, context, sparse=stage == "adapt", logits=0, mode=mode)
    flops = sequence * tokens_per_step * steps / context
    return Estimate(
        tokens=tokens_per_step * steps,
        flops=flops,
        seconds=flops / flops_per_second,
        weight_bytes=held * (weight_bytes + copies),
        gradient_bytes=trainable * weight_bytes,
        optimizer_bytes=trainable * 8,
        activation_bytes=activation_bytes(
            shape, stage, micro_batch_tokens or tokens_per_step, value_bytes, checkpointing=checkpointing
        ),
    )


def run_estimate(model_config: Any, run: TrainConfig, flops_per_second: float, *, value_bytes: int = 4) -> Estimate:
    """Memory and time of a configured run: the sum of its phases' times, the peak of their memory.

    model_config: of the model that is trained. An adaptation without selection costs what pretraining costs.
    flops_per_second and value_bytes as in train_estimate. Raises UserError as train_estimate does.
    """
    phases = [
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
        )
        for phase in run.phases
    ]
    if not phases:
        raise UserError("the run has no phases: give at least one [[phases]] table")
    return dataclasses.replace(
        max(phases, key=lambda phase: phase.memory_bytes),
        tokens=sum(phase.tokens for phase in phases),
        flops=sum(phase.flops for phase in phases),
        seconds=sum(phase.seconds for phase in phases),
    )
