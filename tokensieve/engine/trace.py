"""What one token's attention read, layer by layer.

A trace holds the keys that were selected for the token, and the shares that dense attention would give to every key.

Legend: N tokens of a chunk, T keys, K selected, H heads, D key width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve import ops
from tokensieve.model.entries import ContiguousKeys
from tokensieve.model.selection import SelectionContext


@dataclass(frozen=True)
class LayerTrace:
    """One layer's part of a trace, for the layer's real input.

    Positions are in ascending order. Shares of attention are means over heads, as fractions of 1.

    layer: index of the layer.
    selected: positions of the selected keys.
    attention: share of each selected key.
    dense: positions of the same number of keys, those to which dense attention would give the largest shares.
    dense_attention: share of each of those in dense attention.
    kept: share that dense attention gives to all selected keys together.
    """

    layer: int
    selected: tuple[int, ...]
    attention: tuple[float, ...]
    dense: tuple[int, ...]
    dense_attention: tuple[float, ...]
    kept: float


class AttentionTrace:
    """Recorder of what every layer selects for the last token of a chunk of a prompt."""

    def __init__(self) -> None:
        self.layers: list[LayerTrace] = []

    def __call__(self, c: SelectionContext, indices_NK: Tensor | None) -> None:
        last = c.rows(slice(len(c) - 1, None))
        dense_T = last.head_mass()[0, : int(last.ends_N)]
        if indices_NK is None:
            selected, attention = torch.arange(len(dense_T), device=dense_T.device), dense_T
        else:
            assert isinstance(c.keys, ContiguousKeys)
            selected = indices_NK[-1]
            selected = selected[selected >= 0].long()
            q, scale = last.attention_queries
            ends = torch.tensor([len(selected)], dtype=torch.int32, device=q.device)
            attention = ops.head_mass(q, c.keys.keys_TGD[selected], torch.zeros_like(ends), ends, scale)[0]
        top = dense_T.topk(len(selected)).indices.sort().values
        self.layers.append(
            LayerTrace(
                c.layer,
                selected=tuple(selected.tolist()),
                attention=tuple(attention.tolist()),
                dense=tuple(top.tolist()),
                dense_attention=tuple(dense_T[top].tolist()),
                kept=float(dense_T[selected].sum()),
            )
        )
