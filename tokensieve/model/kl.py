"""How the indexers' KL gets into the backward pass: with which scale, and on which of two ways.

Legend: N queries.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokensieve.model.pack import Pack


@dataclass(frozen=True)
class KLScale:
    """What one pass's KL weighs in the gradients of its optimizer step, and in the loss.

    Our own loop knows the step's queries beforehand and gives `per_query`. A Hugging Face trainer scales losses in its own ways; there
    `KLCallback` gives `share` and `divisor`, and the gradient is injected past whatever the trainer does to the loss.
    """

    per_query: float | None = None  # weight of one query's KL; None: `share` of the mean over the pass's valid queries
    share: float = 1.0  # weight of the pass's mean in the step's
    divisor: int | None = None  # by what the trainer expects a loss to have been divided; None: no trainer


@dataclass(frozen=True)
class Objective:
    """What a pass is to teach the indexers.

    "warmup": equation (3), attention stays dense and the model's loss is the KL. "adapt": equation (4), its gradient is injected in the
    attention's backward pass. "none": nothing (pretraining, dense models, evaluation). scale None: the mean over each pass's queries.
    """

    kind: Literal["none", "warmup", "adapt"] = "none"
    scale: KLScale | None = None


def query_weights(scale: KLScale | None, pack: Pack, layers: int) -> Tensor:
    """(N) float32: every valid query's share in the mean over queries and layers of equations (3) and (4)."""
    scale = scale or KLScale()
    device = pack.positions_N.device
    if scale.per_query is not None:
        one: float | Tensor = scale.per_query
    else:
        count = pack.valid_count
        one = scale.share / (count.clamp_min(1) if isinstance(count, Tensor) else count)
    valid = torch.ones(pack.positions_N.shape[0], device=device) if pack.valid_N is None else pack.valid_N.float()
    return valid * (one / layers)


def reported(kl: Tensor, scale: KLScale | None) -> Tensor:
    """The KL in nats per query and layer, detached, whatever share of the step the pass is."""
    return kl.detach() / ((scale.share if scale else 1.0) or 1.0)


def warmup_loss(kl: Tensor, scale: KLScale | None, counted: bool) -> Tensor:
    """The model's loss in warm-up: the KL itself, or its value as a trainer expects it, with the KL's own gradient.

    counted: the trainer told the number of labels, so it does not divide the loss by the number of micro-batches.
    """
    if scale is None or scale.divisor is None:
        return kl
    loss = reported(kl, scale) / (scale.divisor if counted else 1)
    if kl.requires_grad:
        loss = InjectedKL.apply(loss, kl, torch.ones_like(kl)).clone()  # a copy, since trainers scale a loss in place
    return loss


class LayerLocalLoss(torch.autograd.Function):
    """A loss of a few parameters whose gradients are taken at once, so that nothing but those gradients waits for the backward pass.

    Forward evaluates `loss()` and differentiates it by `parameters`; backward scales the stored gradients. Memory between the two is the
    parameters' size, whatever the loss held: this is what lets warm-up run one layer at a time under any trainer.
    """

    @staticmethod
    def forward(ctx, loss, *parameters: Tensor) -> Tensor:
        with torch.enable_grad():
            value = loss()
        ctx.save_for_backward(*torch.autograd.grad(value, parameters))
        return value.detach()

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return None, *(g * grads[0].to(g.dtype) for g in ctx.saved_tensors)


class InjectedKL(torch.autograd.Function):
    """Passes `out` on unchanged; in backward sends `weight` as the gradient of `kl`, of its shape, whatever loss the trainer computes."""

    @staticmethod
    def forward(ctx, out: Tensor, kl_N: Tensor, weight_N: Tensor) -> Tensor:
        ctx.save_for_backward(weight_N)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (weight_N,) = ctx.saved_tensors
        return grads[0], weight_N, None
