"""What one token's attention looked at, layer by layer: what was selected for it, and what dense attention would have given to every key.

Legend: N tokens of a chunk, T keys, K selected, H heads, E entry width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve import ops
from tokensieve.model.selection import Selection, SelectionContext


@dataclass(frozen=True)
class Look:
    """Of one layer. Positions ascend; shares are means over heads and of 1.

    attention: what each selected key got. dense: as many keys, those to which attention to every key would give most, and
    dense_attention what it would give them. kept: its share on the selected keys together. All of it for the layer's real input.
    """

    layer: int
    selected: tuple[int, ...]
    attention: tuple[float, ...]
    dense: tuple[int, ...]
    dense_attention: tuple[float, ...]
    kept: float


class Lens:
    """A selection that selects what another one does, and takes down what it sees of the last token."""

    def __init__(self) -> None:
        self.looks: list[Look] = []

    def over(self, selection: Selection) -> Selection:
        def select(c: SelectionContext) -> Tensor | None:
            indices = selection(c)
            self.looks.append(_look(c, indices))
            return indices

        return select


def _look(c: SelectionContext, indices_NK: Tensor | None) -> Look:
    last = slice(c.pack.ends_N.shape[0] - 1, None)
    every_T = c.head_mass(last)[0, : int(c.pack.ends_N[-1])]
    if indices_NK is None:
        selected, given = torch.arange(len(every_T), device=every_T.device), every_T
    else:
        selected = indices_NK[-1]
        selected = selected[selected >= 0].long()
        q, k, scale = c.attention
        ends = torch.tensor([len(selected)], dtype=torch.int32, device=q.device)
        given = ops.head_mass(q[last], k[selected], torch.zeros_like(ends), ends, scale)[0]
    most = every_T.topk(len(selected)).indices.sort().values
    return Look(
        c.layer,
        selected=tuple(selected.tolist()),
        attention=tuple(given.tolist()),
        dense=tuple(most.tolist()),
        dense_attention=tuple(every_T[most].tolist()),
        kept=float(every_T[selected].sum()),
    )
