"""Multi-head latent attention, as in DeepSeek: a token has one entry [c_KV, k_R], which serves all heads.

Two forms of the same function read it:
- masked form (MHA): keys and values of every head are expanded from the entries. It is cheaper per query and key, but
  each key is expanded once, so it pays for many queries and never in decode.
- gathered form (MQA): W_UK is absorbed into q and W_UV into the output. All heads share the entry as key (E wide) and
  value (its first L).

Legend: N query tokens, T keys, H heads, L latent width (kv_lora_rank), R rope dims, E = L + R entry width, Q = nope + R
width of a head's query, V value width, S width of the queries' input. Source: DeepSeek-V2, arXiv 2405.04434, section
2.1; DeepSeek-V3.2-Exp report, section 2.1.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from tokensieve.families import ModelConfig, family_of
from tokensieve.model.attention import Attention
from tokensieve.model.entries import ContiguousKeys
from tokensieve.model.linear import effective_weight
from tokensieve.model.norm import RMSNorm
from tokensieve.model.pack import Pack
from tokensieve.model.rope import Rotation, rotate_half_split, rotate_interleaved
from tokensieve.model.selection import Once


class LatentQueries(NamedTuple):
    nope: Tensor  # (N, H, nope)
    rope: Tensor  # (N, H, R)
    absorbed: Once  # W_UK (H, nope, L) and W_UV (H, V, L), which the gathered form alone reads


class LatentAttention(Attention):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent = config.kv_lora_rank
        self.rotate = rotate_interleaved if family_of(config).rope(config)[1] else rotate_half_split
        hidden, bias = config.hidden_size, config.attention_bias
        query_width = self.heads * (self.nope + self.rope)
        self.compresses_queries = config.q_lora_rank is not None
        if self.compresses_queries:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_width, bias=False)
        else:
            self.q_proj = nn.Linear(hidden, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent + self.rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, hidden, bias=bias)
        self.add_indexer(config)

    def project(self, h_ND: Tensor, rotation: Rotation) -> tuple[LatentQueries, Tensor, Tensor]:
        if self.compresses_queries:
            source = self.q_a_layernorm(self.q_a_proj(h_ND))
            q = self.q_b_proj(source)
        else:
            source, q = h_ND, self.q_proj(h_ND)
        q = q.view(-1, self.heads, self.nope + self.rope)  # a view and slices: unflatten and split cost decode more
        rope = self.rotate(q[..., self.nope :], rotation.attention)
        queries = LatentQueries(q[..., : self.nope], rope, Once(lambda: self._absorbed(q)))
        entries_NE = self.kv_a_proj_with_mqa(h_ND)
        c_kv, k_rope = entries_NE[:, : self.latent], entries_NE[:, self.latent :]
        k_rope = self.rotate(k_rope.unsqueeze(1), rotation.attention).squeeze(1)
        return queries, torch.cat((self.kv_a_layernorm(c_kv), k_rope), dim=-1), source

    def projections(self) -> tuple[Tensor, Tensor]:
        up = (self.q_b_proj if self.compresses_queries else self.q_proj).weight
        nope_HQS, rope_HRS = up.view(self.heads, -1, up.shape[1]).split([self.nope, self.rope], dim=1)
        w_uk, _ = self._absorbed(up)
        return torch.cat((w_uk.transpose(1, 2) @ nope_HQS, rope_HRS), dim=1), self.kv_a_proj_with_mqa.weight[None]

    def softmax_scale(self, rotation: Rotation) -> float:
        return (self.nope + self.rope) ** -0.5 * rotation.softmax_factor

    def _absorbed(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The halves of kv_b_proj."""
        w = effective_weight(self.kv_b_proj, "kv_b_proj", like).to(like.dtype).view(self.heads, -1, self.latent)
        return w[:, : self.nope], w[:, self.nope :]

    def gathered_queries(self, queries: LatentQueries) -> Tensor:
        """(N, H, E) = [q_nope W_UK, q_rope]."""
        w_uk, _ = queries.absorbed()
        latent = torch.bmm(queries.nope.transpose(0, 1), w_uk).transpose(0, 1)
        return torch.cat((latent, queries.rope), dim=-1)

    def gathered_output(self, queries: LatentQueries, out_NHL: Tensor) -> Tensor:
        """(N, H, V) = out W_UV."""
        _, w_uv = queries.absorbed()
        return torch.bmm(out_NHL.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)

    def per_head(self, queries: LatentQueries, keys: ContiguousKeys, repeat: bool) -> tuple[Tensor, Tensor, Tensor]:
        """q (N, H, Q), k (T, H, Q), v (T, H, V)."""
        c_kv, k_rope = keys.entries_TW.split([self.latent, self.rope], dim=-1)
        k_nope, v = (
            self.kv_b_proj(c_kv).unflatten(-1, (self.heads, self.nope + self.value)).split([self.nope, self.value], -1)
        )
        k = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, self.heads, -1)), dim=-1)
        return torch.cat((queries.nope, queries.rope), dim=-1), k, v

    def expansion_pays(self, pack: Pack) -> bool:
        saving = pack.length * (2 * self.latent - self.nope - self.value)  # the queries of its own row read a key
        return saving > self.latent * (self.nope + self.value)
