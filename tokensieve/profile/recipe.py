"""The two trainings that sparse attention would take: tokens as in the technical report scaled, and what they cost.

The report's numbers are those of the configs paper_warmup and paper_adapt, for the model of `SparseConfig`'s defaults:
2.1 billion tokens of warm-up for 0.85 billion parameters of indexers, and 944 billion of adaptation for 37 billion
active parameters. Both are scaled by the parameters that they were spent on. Source: technical report, section 2.1.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import psutil
import torch

from tokensieve import cost
from tokensieve.config import PhaseConfig, TrainConfig, load_config
from tokensieve.families import SparseConfig
from tokensieve.model import DecoderForCausalLM
from tokensieve.train.estimate import SHORTEST, estimate
from tokensieve.train.learning import learning
from tokensieve.train.loop import STAGES

AFFORDABLE = 30.0  # seconds of one pass that is timed for the speed

Name = Literal["warmup", "adapt"]


@dataclass(frozen=True)
class StageCost:
    """Tokens, FLOPs, bytes and seconds of a stage. seconds: None if unknown, and `speed` then says why.

    context: tokens of a sequence; the memory is that of one sequence at a time. flops_per_second: that `seconds` are
    counted with. speed: where that number is from.
    """

    stage: Name
    context: int
    tokens: int
    flops: float
    memory_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    seconds: float | None
    flops_per_second: float | None
    speed: str


def training_costs(
    sparse: DecoderForCausalLM,
    top_k: int,
    context: int,
    forward_rate: float,
    peak_flops: float | None = None,
    utilization: float = 0.4,
) -> list[StageCost]:
    """Warm-up and adaptation of a sparse model with k = `top_k` on sequences of `context` tokens.

    Args:
        forward_rate: FLOPs per second of a forward pass on this machine, which says whether timing one is affordable.
        peak_flops: of the device that will train; None: this machine, on which a pass of each stage is timed.
        utilization: the share of `peak_flops` that training reaches.
    """
    return [
        _cost(stage, sparse, top_k, context, forward_rate, peak_flops, utilization) for stage in ("warmup", "adapt")
    ]


def paper_tokens(stage: Name, shape: cost.Shape) -> int:
    """The report's tokens of a stage, scaled to a sparse shape by indexer (warm-up) or active parameters."""
    paper, own = cost.parameters(cost.shape_of(SparseConfig())), cost.parameters(shape)
    share = own.indexer / paper.indexer if stage == "warmup" else own.active / paper.active
    phases = load_config(TrainConfig, f"paper_{stage}").phases
    return math.ceil(share * sum(phase.steps * phase.sequences * phase.context for phase in phases))


def _cost(
    stage: Name,
    sparse: DecoderForCausalLM,
    top_k: int,
    context: int,
    forward_rate: float,
    peak_flops: float | None,
    utilization: float,
) -> StageCost:
    config = type(sparse.config).from_dict(sparse.config.to_dict() | {"index_topk": top_k})
    tokens = paper_tokens(stage, cost.shape_of(config))
    phases = (PhaseConfig(steps=math.ceil(tokens / context), context=context, sequences=1),)
    run = replace(load_config(TrainConfig, f"paper_{stage}"), phases=phases, context_parallel=1)
    device = sparse.lm_head.weight.device
    value_bytes = 4 if peak_flops is None and device.type == "cpu" else 2
    rate, speed = (peak_flops * utilization, f"{utilization:.0%} of the peak given") if peak_flops else (None, "")
    if rate is None:
        rate, speed = _timed(run, sparse, device, forward_rate, value_bytes)
    needed = cost.run_estimate(config, run, rate or 1.0, value_bytes=value_bytes)
    return StageCost(
        stage=stage,
        context=context,
        tokens=needed.tokens,
        flops=needed.flops,
        memory_bytes=needed.memory_bytes,
        weight_bytes=needed.weight_bytes,
        gradient_bytes=needed.gradient_bytes,
        optimizer_bytes=needed.optimizer_bytes,
        activation_bytes=needed.activation_bytes,
        seconds=needed.seconds if rate else None,
        flops_per_second=rate,
        speed=speed,
    )


def _timed(
    run: TrainConfig, sparse: DecoderForCausalLM, device: torch.device, forward_rate: float, value_bytes: int
) -> tuple[float | None, str]:
    """(FLOPs per second of a stage's pass on this machine, where they are from), or None and why it is not timed."""
    tokens = min(run.phases[0].context, max(SHORTEST, 2 * sparse.top_k))
    row = replace(run, phases=(PhaseConfig(1, tokens, 1),))
    one = cost.run_estimate(sparse.config, row, forward_rate, value_bytes=value_bytes)
    if one.seconds > AFFORDABLE:
        return None, "one pass would take too long on this machine; give --peak-flops"
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if one.gradient_bytes + one.activation_bytes > free:
        return None, "one pass does not fit into this machine's free memory; give --peak-flops"
    stage, trunk = STAGES[run.stage], sparse.model
    was_training, checkpointing = sparse.training, trunk.gradient_checkpointing
    with learning(sparse, stage.learners(run)):
        try:
            sparse.train()
            trunk.gradient_checkpointing = run.activation_checkpointing
            _, rehearsal = estimate(row, stage, sparse, device)
        finally:
            trunk.gradient_checkpointing = checkpointing
            sparse.train(was_training)
    return rehearsal.flops / rehearsal.seconds, f"a pass over {tokens:,} tokens, timed on this machine"
