"""What differs between the three stages of training: everything else is the one loop.

Legend: B sequences of a micro-batch, S tokens each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tokensieve.config import TrainConfig
from tokensieve.model import DecoderForCausalLM


@dataclass(frozen=True)
class StepTotals:
    """Counts over the whole optimizer step, so that no result depends on how it is cut into micro-batches."""

    labels: float  # tokens that are predicted, or their weights
    queries: int  # tokens that are not padding


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


def language_losses(model: DecoderForCausalLM, batch: dict[str, Tensor], totals: StepTotals) -> Losses:
    """Cross-entropy summed over the micro-batch and divided by the step's total; the KL comes along where an indexer trains."""
    model.model.kl_weight = 1.0 / totals.queries
    labels, weights = batch["labels"], batch.get("loss_weights")
    out = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    entropy = F.cross_entropy(
        out.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none", ignore_index=-100
    )
    if weights is not None:
        entropy = entropy * weights[:, 1:].flatten()
    loss = entropy.sum() / totals.labels
    return Losses(loss, loss.detach(), None if out.kl is None else out.kl.detach())
