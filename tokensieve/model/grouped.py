"""Grouped-query attention, as in Llama and Qwen: a token's entry is one key and one value for each group of heads.

All groups share the selected keys. In Qwen3, queries and keys are normalized per head before they are rotated.

Legend: N query tokens, T keys, H heads, G key-value groups (head h reads group h // (H/G)), D head width. Source:
arXiv 2305.13245.
"""

import torch
import torch.nn as nn
from torch import Tensor

from tokensieve.families import ModelConfig, family_of
from tokensieve.model.attention import Attention
from tokensieve.model.entries import ContiguousKeys
from tokensieve.model.norm import RMSNorm
from tokensieve.model.pack import Pack
from tokensieve.model.rope import Rotation, rotate_half_split


class GroupedAttention(Attention):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        family, hidden = family_of(config), config.hidden_size
        self.width, groups, biased = self.entry.d_k, self.entry.groups, family.biased(config)
        self.q_proj = nn.Linear(hidden, self.heads * self.width, bias="q_proj" in biased)
        self.k_proj = nn.Linear(hidden, groups * self.width, bias="k_proj" in biased)
        self.v_proj = nn.Linear(hidden, groups * self.width, bias="v_proj" in biased)
        self.o_proj = nn.Linear(self.heads * self.width, hidden, bias="o_proj" in biased)
        self.q_norm = RMSNorm(self.width, config.rms_norm_eps) if family.head_norms else None
        self.k_norm = RMSNorm(self.width, config.rms_norm_eps) if family.head_norms else None
        self.add_indexer(config)

    def project(self, h_ND: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            projection(h_ND).view(len(h_ND), -1, self.width) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.flatten(0, 1)).view_as(q)
            k = self.k_norm(k.flatten(0, 1)).view_as(k)
        k = rotate_half_split(k, rotation.attention)
        return rotate_half_split(q, rotation.attention), torch.cat((k, v), dim=-1).flatten(1), h_ND

    def projections(self) -> tuple[Tensor, Tensor]:
        q_proj, k_proj = (layer.weight.unflatten(0, (-1, self.width)) for layer in (self.q_proj, self.k_proj))
        return q_proj, k_proj

    def softmax_scale(self, rotation: Rotation) -> float:
        return self.width**-0.5 * rotation.softmax_factor

    def gathered_queries(self, queries: Tensor) -> Tensor:
        return queries

    def gathered_output(self, queries: Tensor, out_NHV: Tensor) -> Tensor:
        return out_NHV

    def per_head(self, queries: Tensor, keys: ContiguousKeys, repeat: bool) -> tuple[Tensor, Tensor, Tensor]:
        k, v = keys.keys_TGD, keys.values_TGV
        if repeat:
            k, v = (x.repeat_interleave(self.heads // self.entry.groups, dim=1) for x in (k, v))
        return queries, k, v

    def expansion_pays(self, pack: Pack) -> bool:
        """As in `Attention`. Expansion only copies, so it pays as soon as several queries read a key."""
        return pack.length > 1
