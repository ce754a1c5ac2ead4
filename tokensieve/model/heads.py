"""The two forms of multi-head latent attention.

Legend: N packed query tokens, T packed keys, H heads, K selected keys, L latent width (kv_lora_rank), R rope dims, E = L + R entry width,
Q width of a head's query (nope + R), V value width.

The cache holds per token the entry [c_KV, k_R]. Two forms of the same function read it:
- MQA form: W_UK is absorbed into q and W_UV into the output, all heads share the entry as key (E wide) and value (its first L).
- MHA form: K and V of every head are expanded from the entries. Cheaper per query and key, but the expansion costs once per key, so it
  pays for many queries and never in decode.
"""

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokensieve import ops
from tokensieve.model.pack import Pack

if TYPE_CHECKING:
    from tokensieve.model.attention import Attention

# Sparse prefill: up to so many times k keys the masked MHA form runs.
# Measured on a GPU (docs/kernels.md), a guess on the CPU (docs/results.md).
MASKED_FORM_KEYS = {"cpu": 3, "cuda": 4}


class Heads:
    """The queries of one pass and the entries they may read, in the two forms of MLA."""

    def __init__(
        self, attention: "Attention", q_nope_NHD: Tensor, q_rope_NHR: Tensor, entries_TE: Tensor, backend: str
    ):
        self.a, self.backend = attention, backend
        self.q_nope, self.q_rope, self.entries = q_nope_NHD, q_rope_NHR, entries_TE

    @cached_property
    def _up_projections(self) -> tuple[Tensor, Tensor]:
        """W_UK (H, nope, L) and W_UV (H, V, L) out of kv_b_proj."""
        w = self.a.kv_b_proj.weight.to(self.entries.dtype).view(self.a.heads, -1, self.a.latent)
        return w[:, : self.a.nope], w[:, self.a.nope :]

    def absorbed(self) -> Tensor:
        """MQA queries (N, H, E) = [q_nope W_UK, q_rope]."""
        latent = torch.bmm(self.q_nope.transpose(0, 1), self._up_projections[0]).transpose(0, 1)
        return torch.cat((latent, self.q_rope), dim=-1)

    def up(self, out_NHL: Tensor) -> Tensor:
        """(N, H, V) from the attention's output over latent values."""
        return torch.bmm(out_NHL.transpose(0, 1), self._up_projections[1].transpose(1, 2)).transpose(0, 1)

    def expanded(self) -> tuple[Tensor, Tensor, Tensor]:
        """MHA form: q (N, H, Q), k (T, H, Q), v (T, H, V)."""
        a = self.a
        c_kv, k_rope = self.entries.split([a.latent, a.rope], dim=-1)
        k_nope, v = a.kv_b_proj(c_kv).unflatten(-1, (a.heads, a.nope + a.value)).split([a.nope, a.value], dim=-1)
        k = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, a.heads, -1)), dim=-1)
        return torch.cat((self.q_nope, self.q_rope), dim=-1), k, v

    def attention_inputs(self) -> tuple[Tensor, Tensor, float]:
        return self.a.peers.all_heads(self.absorbed()), self.entries.unsqueeze(1), self.a.scale

    def _expansion_pays(self, pack: Pack) -> bool:
        """Whether expanding K and V once per key costs less than the wider products of the MQA form cost per query and key."""
        a = self.a
        saved = pack.length * (2 * a.latent - a.nope - a.value)  # a key is read by the queries of its own row
        return saved > a.latent * (a.nope + a.value)

    def _masked_keys(self, k: int) -> int:
        return k * MASKED_FORM_KEYS["cuda" if self.entries.is_cuda else "cpu"]

    def dense(self, pack: Pack, form: str) -> Tensor:
        ranges = pack.starts_N, pack.ends_N
        if form == "mha" or (form == "auto" and (pack.bounds is not None or self._expansion_pays(pack))):
            q, k, v = self.expanded()
            return ops.dense_attention(
                q, k, v, *ranges, self.a.scale, bounds=pack.bounds, longest=pack.longest, backend=self.backend
            )[0]
        k = self.entries.unsqueeze(1)
        v = k[..., : self.a.latent]
        out, _ = ops.dense_attention(self.absorbed(), k, v, *ranges, self.a.scale, backend=self.backend)
        return self.up(out)

    def sparse(self, indices: Tensor, pack: Pack, form: str) -> Tensor:
        a = self.a
        if form == "mha" or (
            form == "auto" and pack.max_keys <= self._masked_keys(indices.shape[1]) and self._expansion_pays(pack)
        ):
            q, k, v = self.expanded()
            return ops.masked_attention(q, k, v, indices, a.scale, backend=self.backend)[0]
        kv, width = self.entries.unsqueeze(1), a.latent + a.rope
        out, _ = ops.sparse_attention(self.absorbed(), kv, indices, a.scale, width, 0, a.latent, backend=self.backend)
        return self.up(out)
