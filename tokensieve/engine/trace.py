"""What one token's attention looked at, layer by layer: what was selected for it, and what dense attention would give to every key.

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
    """One layer's part. Positions ascend; shares are means over heads, of 1.

    attention: the share of each selected key. dense: the same number of keys, those to which attention to every key would give most, and
    dense_attention their shares. kept: the share that dense attention gives to the selected keys together. All of it for the layer's real
    input.
    """

    layer: int
    selected: tuple[int, ...]
    attention: tuple[float, ...]
    dense: tuple[int, ...]
    dense_attention: tuple[float, ...]
    kept: float


class AttentionTrace:
    """Takes down, in a pass over a chunk of a prompt, what every layer's selection gave to the last token."""

    def __init__(self) -> None:
        self.layers: list[LayerTrace] = []

    def __call__(self, c: SelectionContext, indices_NK: Tensor | None) -> None:
        last = c.rows(slice(len(c) - 1, None))
        every_T = last.head_mass()[0, : int(last.ends_N)]
        if indices_NK is None:
            selected, given = torch.arange(len(every_T), device=every_T.device), every_T
        else:
            assert isinstance(c.keys, ContiguousKeys)
            selected = indices_NK[-1]
            selected = selected[selected >= 0].long()
            q, scale = last.attention_queries
            ends = torch.tensor([len(selected)], dtype=torch.int32, device=q.device)
            given = ops.head_mass(q, c.keys.keys_TGD[selected], torch.zeros_like(ends), ends, scale)[0]
        most = every_T.topk(len(selected)).indices.sort().values
        self.layers.append(
            LayerTrace(
                c.layer,
                selected=tuple(selected.tolist()),
                attention=tuple(given.tolist()),
                dense=tuple(most.tolist()),
                dense_attention=tuple(every_T[most].tolist()),
                kept=float(every_T[selected].sum()),
            )
        )
