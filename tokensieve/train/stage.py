"""The differences between the three stages of training. Everything else is the one loop.

Legend: B sequences of a micro-batch, S tokens each, N = B * S; D hidden width.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokensieve import cost
from tokensieve.config import TrainConfig
from tokensieve.evals.trial import try_selection
from tokensieve.model import DecoderForCausalLM, ForwardOptions, KLScale, Objective
from tokensieve.model.selection import resolve
from tokensieve.train import precision
from tokensieve.train.learning import Learners
from tokensieve.train.parallelize import Root


@dataclass(frozen=True)
class StepTotals:
    """Counts over the whole optimizer step, so that no result depends on its division into micro-batches."""

    labels: float  # tokens that are predicted, or their weights
    queries: int  # all tokens: packed rows have no padding


class Losses(NamedTuple):
    """One micro-batch's shares of the step's means, of the tokens that this rank has. A tuple, for FSDP's hooks.

    Backward runs on `total`; the KL's gradient comes with it (`model/kl.py`).
    """

    total: Tensor
    lm: Tensor | None  # nats per predicted token
    kl: Tensor | None  # nats per query, mean over layers
    loads: tuple[Tensor, ...] = ()  # per layer with experts: tokens sent to each expert (E)


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    objective: of the indexers in its passes. learners: the parameters that learn. losses: of one micro-batch.
    after_step: called after each step with the step's expert loads.
    """

    objective: Callable[[TrainConfig], Literal["none", "warmup", "adapt"]]
    learners: Callable[[TrainConfig], Learners]
    losses: Callable[[DecoderForCausalLM, dict[str, Tensor], StepTotals, ForwardOptions], Losses]
    after_step: Callable[[DecoderForCausalLM, TrainConfig, tuple[Tensor, ...]], None] | None = None


def options_of(stage: Stage, config: TrainConfig) -> ForwardOptions:
    """Options of a run's passes, without the KL's scale, which differs from step to step.

    selection true leaves the selector open: the indexer, or that of a `tokensieve.selecting` block around the run.
    """
    selection, objective = "dense" if config.selection is False else config.selection, stage.objective(config)
    return ForwardOptions(
        selector=None if selection is True else resolve(selection),
        backend=config.backend,
        objective=Objective(objective, every=1 if objective == "none" else config.kl_every),
    )


def try_selector(config: TrainConfig, model: DecoderForCausalLM, device: torch.device) -> None:
    """UserError if the config names a selector of one's own that breaks its contract: before the first step."""
    if isinstance(config.selection, str):
        with _products(device):
            try_selection(model, config.selection)


def _products(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Within the block products are in the precision of training."""
    dtype = precision.product_dtype(device)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def backward(
    stage: Stage,
    model: DecoderForCausalLM | Root,
    batch: dict[str, Tensor],
    totals: StepTotals,
    options: ForwardOptions,
    device: torch.device,
) -> Losses:
    """Forward and backward pass of one micro-batch; on a GPU under bfloat16 autocast.

    batch: of whole rows, of which a rank of `options.context` computes its tokens.
    """
    inputs = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
    objective = options.objective or Objective()
    scaled = replace(options, objective=replace(objective, scale=KLScale(per_query=1.0 / totals.queries)))
    with _products(device):
        arguments = inputs, totals, scaled
        losses = model(stage.losses, *arguments) if isinstance(model, Root) else stage.losses(model, *arguments)
    losses.total.backward()
    return losses


def language_losses(
    model: DecoderForCausalLM, batch: dict[str, Tensor], totals: StepTotals, options: ForwardOptions
) -> Losses:
    """Cross-entropy, summed over the micro-batch and divided by the step's total; and the KL if an indexer trains."""
    out = model.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], options=options)
    assert out.last_hidden_state is not None
    # The labels are shifted, not the logits, whose gradient would have to be copied to a larger tensor.
    context = options.context

    def predicted(x_BS: Tensor, last: float) -> Tensor:
        """What belongs to the next token, of this rank's tokens."""
        shifted = F.pad(x_BS[:, 1:], (0, 1), value=last)
        return (shifted if context is None else context.own(shifted)).flatten()

    targets = predicted(batch["labels"], -100)
    entropy = _entropies(model.lm_head, out.last_hidden_state.flatten(0, 1), targets)
    weights = batch.get("loss_weights")
    if weights is not None:
        entropy = entropy * predicted(weights, 0)
    loss = entropy.sum() / totals.labels
    loads = tuple(load for load in out.loads or () if load is not None)
    return Losses(loss, loss.detach(), None if out.kl is None else out.kl.detach(), loads)


def _entropies(head: nn.Linear, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropies (N) float32 of the head's logits, which exist for at most `cost.head_rows` tokens at a time."""

    def entropies(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), targets, reduction="none", ignore_index=-100)

    rows = cost.head_rows(head.weight.shape[0])
    if len(hidden_ND) <= rows:
        return entropies(hidden_ND, targets_N)
    pieces = zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)
    return torch.cat([checkpoint(entropies, *piece, use_reentrant=False) for piece in pieces])
