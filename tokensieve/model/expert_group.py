"""Expert parallelism: the ranks of a group divide the routed experts of a layer, and exchange tokens.

Rank r of R holds the experts r E / R to (r + 1) E / R. A token goes once to each of its experts, and its output comes
back to the rank that it came from, which weights and sums. Nothing is dropped and no expert is padded, so the outputs
are those of one process. In the backward pass gradients take the same ways in the other direction.

Legend: E routed experts of the layer, R ranks of the group, M rows of this rank, a row being a token for one expert, D
hidden width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks that divide the experts of a layer. All call `products` for the same layers in the same order.

    size: R. group: of torch.distributed.
    """

    size: int
    group: Any

    @torch.compiler.disable  # every new set of counts would be another program
    def products(self, own: Callable[[Tensor, Tensor, Tensor], Tensor], x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """Outputs (M, D) of rows that are sorted by expert, wherever these are.

        own: outputs of rows that are sorted by this rank's experts, from the rows, the end of each expert's rows, and
        their number. counts_E: rows of each expert, int64.
        """
        sent_RE = counts_E.view(self.size, -1)
        arriving_RE = torch.empty_like(sent_RE)
        dist.all_to_all_single(arriving_RE, sent_RE, group=self.group)
        away, here = torch.stack((sent_RE.sum(1), arriving_RE.sum(1))).tolist()
        rows = _Exchanged.apply(x_MD, here, away, self.group)
        # They arrive rank by rank, and each rank's by expert.
        expert = torch.arange(arriving_RE.shape[1], device=x_MD.device).repeat(self.size)
        order = expert.repeat_interleave(arriving_RE.flatten(), output_size=sum(here)).argsort(stable=True)
        own_E = arriving_RE.sum(0)
        if not sum(here):
            # With a row of zeros the experts have a gradient, in whose sum over ranks this one must take part.
            rows, order, own_E = F.pad(rows, (0, 0, 0, 1)), order.new_zeros(1), F.pad(own_E[1:], (0, 1), value=1)
        y = own(rows.index_select(0, order), own_E.cumsum(0), own_E)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return _Exchanged.apply(y.index_select(0, back[: sum(here)]), away, here, self.group)


class _Exchanged(torch.autograd.Function):
    """Rows of all ranks for this one, in the order of the ranks. here, away: how many each rank gives and gets."""

    @staticmethod
    def forward(ctx, x_MD: Tensor, here: list[int], away: list[int], group: Any) -> Tensor:
        ctx.sizes = away, here, group
        return _exchanged(x_MD, here, away, group)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grads[0], *ctx.sizes), None, None, None


def _exchanged(x_MD: Tensor, here: list[int], away: list[int], group: Any) -> Tensor:
    out = x_MD.new_empty(sum(here), *x_MD.shape[1:])
    dist.all_to_all_single(out, x_MD.contiguous(), here, away, group)
    return out
