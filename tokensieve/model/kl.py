"""How the indexers' KL gets into the backward pass: with which scale, and on which of two ways."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KLScale:
    """What one pass's KL weighs in the gradients of its optimizer step, and in the loss.

    Our own loop knows the step's queries beforehand and gives `per_query`. A Hugging Face trainer scales losses in its own ways; there
    `KLCallback` gives `share` and `divisor`, and the gradient is injected past whatever the trainer does to the loss.
    """

    per_query: float | None = None  # weight of one query's KL; None: `share` of the mean over the pass's valid queries
    share: float = 1.0  # weight of the pass's mean in the step's
    divisor: int | None = None  # by what the trainer expects a loss to have been divided; None: no trainer


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
