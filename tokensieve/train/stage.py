"""What differs between the three stages of training: everything else is the one loop.

Legend: B sequences of a micro-batch, S tokens each.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokensieve.config import TrainConfig
from tokensieve.model import DecoderForCausalLM, KLScale


@dataclass(frozen=True)
class StepTotals:
    """Counts over the whole optimizer step, so that no result depends on how it is cut into micro-batches."""

    labels: float  # tokens that are predicted, or their weights
    queries: int  # all tokens: packed rows have no padding


@dataclass(frozen=True)
class Losses:
    """One micro-batch's shares of the step's means; `total` is what backward runs on."""

    total: Tensor
    lm: Tensor | None  # nats per predicted token
    kl: Tensor | None  # nats per query, mean over layers


@dataclass(frozen=True)
class Stage:
    prepare: Callable[[DecoderForCausalLM, TrainConfig], None]  # what trains, on which objective
    losses: Callable[[DecoderForCausalLM, dict[str, Tensor], StepTotals], Losses]
    after_step: Callable[[DecoderForCausalLM, TrainConfig], None] | None = None


def backward(
    stage: Stage, model: DecoderForCausalLM, batch: dict[str, Tensor], totals: StepTotals, device: torch.device
) -> Losses:
    """Forward and backward of one micro-batch; on CUDA under bfloat16 autocast."""
    moved = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
    with torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext():
        losses = stage.losses(model, moved, totals)
    losses.total.backward()
    return losses


def language_losses(model: DecoderForCausalLM, batch: dict[str, Tensor], totals: StepTotals) -> Losses:
    """Cross-entropy summed over the micro-batch and divided by the step's total; the KL comes along where an indexer trains."""
    model.model.kl_scale = KLScale(per_query=1.0 / totals.queries)
    out = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    # The labels are shifted and not the logits, whose gradient would have to be copied to a larger tensor.
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100).flatten()
    entropy = F.cross_entropy(out.logits.flatten(0, 1).float(), targets, reduction="none", ignore_index=-100)
    weights = batch.get("loss_weights")
    if weights is not None:
        entropy = entropy * F.pad(weights[:, 1:], (0, 1)).flatten()
    loss = entropy.sum() / totals.labels
    return Losses(loss, loss.detach(), None if out.kl is None else out.kl.detach())
