"""The indexers' KL in the backward pass: its scale, and the two ways in which its gradient enters.

Legend: N queries.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tokensieve.config import KL_BLOCK
from tokensieve.model.pack import Pack


@dataclass(frozen=True)
class KLScale:
    """Weight of one pass's KL in the gradients of its optimizer step, and in the loss.

    Our own loop knows the number of queries of the step beforehand and sets `per_query`. A Hugging Face trainer scales
    losses in its own ways. For it `KLCallback` sets `share` and `divisor`, and the gradient is injected, so that it
    does not depend on anything the trainer does to the loss.
    """

    per_query: float | None = None  # weight of one query's KL; None: `share` of the mean over the pass's valid queries
    share: float = 1.0  # weight of the pass's mean in the step's mean
    divisor: int | None = None  # the trainer expects a loss that is already divided by this; None: no trainer


class KLQueries(NamedTuple):
    """The queries of a pass that have a KL, and in adaptation the others if there are any, which are read apart."""

    rows: slice | Tensor = slice(None)
    others: Tensor | None = None


ALL_QUERIES = KLQueries()


@dataclass(frozen=True)
class Objective:
    """Objective of the indexers in a pass.

    "warmup": equation (3); attention stays dense and the model's loss is the KL. "adapt": equation (4); its gradient is
    injected in the attention's backward pass. "none": the indexers learn nothing (pretraining, dense models,
    evaluation). scale None: the mean over each pass's queries.

    every, first: the KL is taken at the blocks of queries first, first + every, ... of the pass alone, and each of them
    counts `every` times. Over all values of `first` this is equation (3) or (4). A block is one query in "warmup", and
    `KL_BLOCK` neighbours in "adapt". ValueError for an `every` that is not 1 in "none", or a `first` that is not below
    it.
    """

    kind: Literal["none", "warmup", "adapt"] = "none"
    scale: KLScale | None = None
    every: int = 1
    first: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.every or (self.every > 1 and self.kind == "none"):
            raise ValueError(
                f"objective {self.kind!r}: every is {self.every} and first {self.first}; first is at least 0 and less "
                "than every, which is 1 in 'none'"
            )

    def queries(self, N: int, device: torch.device) -> KLQueries:
        """The queries of a pass of N that have a KL."""
        if self.every == 1 or self.kind == "warmup":
            return KLQueries(slice(self.first, None, self.every))
        query = torch.arange(N)
        taught = query // KL_BLOCK % self.every == self.first
        return KLQueries(query[taught].to(device), query[~taught].to(device))


def query_weights(objective: Objective, queries: KLQueries, pack: Pack, layers: int) -> Tensor:
    """Weights in the mean over queries and layers of equations (3) and (4), of the queries that have a KL.

    As many as these, float32; 0 for padding.
    """
    scale = objective.scale or KLScale()
    device = pack.positions_N.device
    if scale.per_query is not None:
        weight: float | Tensor = scale.per_query
    else:
        count = pack.valid_count
        weight = scale.share / (count.clamp_min(1) if isinstance(count, Tensor) else count)
    valid = torch.ones(pack.positions_N.shape[0], device=device) if pack.valid_N is None else pack.valid_N.float()
    return valid[queries.rows] * (weight * objective.every / layers)


def reported(kl: Tensor, scale: KLScale | None) -> Tensor:
    """The KL in nats per query and layer, detached, whatever the pass's share in the step."""
    return kl.detach() / ((scale.share if scale else 1.0) or 1.0)


def warmup_loss(kl: Tensor, scale: KLScale | None, counted: bool) -> Tensor:
    """The model's loss in warm-up: the KL itself, or its value as a trainer expects it, with the KL's own gradient.

    counted: the trainer passed the number of labels, so it does not divide the loss by the number of micro-batches.
    """
    if scale is None or scale.divisor is None:
        return kl
    loss = reported(kl, scale) / (scale.divisor if counted else 1)
    if kl.requires_grad:
        loss = InjectedKL.apply(loss, kl, torch.ones_like(kl)).clone()  # a copy, since trainers scale a loss in place
    return loss


class LayerLocalLoss(torch.autograd.Function):
    """A loss of a few parameters, differentiated at once: only their gradients wait for the backward pass.

    Forward evaluates `loss()` and differentiates it by `parameters`; backward scales the stored gradients. Between the
    two it holds as much memory as the parameters, whatever the loss needed. That is why warm-up can run one layer at a
    time under any trainer.
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
    """Passes `out` on unchanged. Backward sends `weight`, of `kl`'s shape, as the gradient of `kl`.

    That gradient does not depend on the loss that the trainer computes.
    """

    @staticmethod
    def forward(ctx, out: Tensor, kl_N: Tensor, weight_N: Tensor) -> Tensor:
        ctx.save_for_backward(weight_N)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (weight_N,) = ctx.saved_tensors
        return grads[0], weight_N, None
