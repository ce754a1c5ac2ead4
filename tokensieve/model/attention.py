"""Multi-head latent attention with a lightning indexer: one module, dense and sparse.

Legend: N packed query tokens, T packed keys, D hidden width, H heads, K selected keys, L latent width (kv_lora_rank), R rope dims,
E = L + R entry width, V value width.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from tokensieve import ops
from tokensieve.config import ModelConfig, UserError
from tokensieve.model.heads import Heads
from tokensieve.model.indexer import Indexer
from tokensieve.model.kl import InjectedKL, LayerLocalLoss
from tokensieve.model.norm import RMSNorm
from tokensieve.model.pack import Pack
from tokensieve.model.pages import PagedStep
from tokensieve.model.rope import Rotation, rotate_half_split, rotate_interleaved, softmax_scale
from tokensieve.model.selection import NO_PEERS, SELECTIONS, Selection, SelectionContext, dense
from tokensieve.model.selection import indexer as indexer_selection


class Cache(Protocol):
    """Where a pass stores its entries and finds the earlier ones: a `LatentCache`, or pages (`tokensieve.engine.runner`).

    `append` gives entries and index keys up to the pass's end, and where the keys are E4M3 (`quantized_index`) their scales.
    """

    quantized_index: bool

    def get_seq_length(self) -> int: ...

    def append(
        self, layer: int, latent_BSE: Tensor, index_BSD: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...


@dataclass
class Pass:
    """What one forward pass wants from every layer, and what the layers hand back."""

    pack: Pack
    rotation: Rotation
    selection: Selection
    top_k: int
    cache: Cache | None = None
    paged: PagedStep | None = None  # instead of a cache: one new token of every sequence, on pages
    objective: Literal["none", "warmup", "adapt"] = "none"
    kl_weight: Tensor | None = None  # (N): gradient weight of each query's KL in every layer
    replay: list[Tensor | None] | None = None  # per layer (N, K) indices to use instead of selecting; None: dense
    form: Literal["auto", "mha", "mqa"] = "auto"
    backend: str = "auto"  # of the ops
    keep_selection: bool = False
    selected: dict[int, Tensor] = field(default_factory=dict)  # layer -> (N, K)
    kl: dict[int, Tensor] = field(default_factory=dict)  # layer -> sum over queries of weight * KL


class Attention(nn.Module):
    """Parameter names are the published checkpoint's. `indexer` exists in sparse models only."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads = config.num_attention_heads
        self.peers = NO_PEERS
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent = config.kv_lora_rank
        self.max_positions = config.max_position_embeddings
        self.use_rope(config.rope_parameters)
        self.rotate = rotate_interleaved if getattr(config, "rope_interleave", True) else rotate_half_split
        hidden, bias = config.hidden_size, config.attention_bias
        query_width = self.heads * (self.nope + self.rope)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent + self.rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, hidden, bias=bias)
        self.indexer = Indexer(config) if config.model_type == "deepseek_v32" else None

    def use_rope(self, rope_parameters: dict[str, Any]) -> None:
        self.scale = softmax_scale(rope_parameters, self.nope + self.rope, self.max_positions)

    def forward(self, h_ND: Tensor, p: Pass) -> Tensor:
        if hasattr(self, "q_proj"):
            source, q = h_ND, self.q_proj(h_ND)
        else:
            source = self.q_a_layernorm(self.q_a_proj(h_ND))
            q = self.q_b_proj(source)
        q = q.view(-1, self.heads, self.nope + self.rope)  # a view and slices: unflatten and split cost decode more
        q_nope, q_rope = q[..., : self.nope], q[..., self.nope :]
        q_rope = self.rotate(q_rope, p.rotation)
        entries_TE = self.kv_a_proj_with_mqa(h_ND)
        c_kv, k_rope = entries_TE[:, : self.latent], entries_TE[:, self.latent :]
        k_rope = self.rotate(k_rope.unsqueeze(1), p.rotation).squeeze(1)
        entries_TE = torch.cat((self.kv_a_layernorm(c_kv), k_rope), dim=-1)
        # The indexer learns from its own loss only: what it reads is detached.
        h, source = h_ND.detach(), source.detach()
        if p.paged is not None:
            heads = Heads(self, q_nope, q_rope, entries_TE, p.backend)
            return self.o_proj(self._decode(heads, h, source, p.paged, p).flatten(1))
        k_I, k_scale = None, None
        if p.cache is not None:
            rows = (p.pack.batch, p.pack.length)
            rounded = not p.cache.quantized_index  # such a cache rounds by itself
            new_keys = None
            if self.indexer is not None:
                new_keys = self.indexer.keys(h, p.rotation, rounded).detach().unflatten(0, rows)
            entries_TE, k_I, k_scale = p.cache.append(self.layer, entries_TE.unflatten(0, rows), new_keys)
            if p.pack.batch == 1:  # K and V are not to be expanded over the room that is still empty
                entries_TE = entries_TE[: p.cache.get_seq_length() + p.pack.length]
        heads = Heads(self, q_nope, q_rope, entries_TE, p.backend)

        def index_inputs(rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
            if self.indexer is None:
                raise UserError("this model has no indexer to select with; make it sparse first: tokensieve sparsify")
            queries = self.indexer.queries if k_scale is None else self.indexer.e4m3_queries
            q_I, w = queries(source[rows], h[rows], p.rotation.rows(rows))
            return q_I, self.indexer.keys(h, p.rotation) if k_I is None else k_I, w

        if p.objective == "warmup":
            out = self._warmup(heads, index_inputs, p)
        else:
            # Where the indexer learns, the choice and the loss read the same tensors, made once and outside of no_grad.
            index = index_inputs() if p.objective == "adapt" else None
            made = None if index is None else lambda rows: (index[0][rows], index[1], index[2][rows])
            indices = self._select(heads, made or index_inputs, k_scale, p)
            if indices is None:
                out = heads.dense(p.pack, p.form)
            elif index is not None:
                out = self._adapt(heads, indices, index, p)
            else:
                out = heads.sparse(indices, p.pack, p.form)
        return self.o_proj(out.flatten(1))

    def _select(self, heads: Heads, index_inputs, k_scale: Tensor | None, p: Pass) -> Tensor | None:
        """(N, K) indices, or None for dense attention: asked for, or the same thing because no query sees more than k keys."""
        if p.replay is not None:
            indices = p.replay[self.layer]
        elif p.selection is dense:
            return None
        elif (
            p.selection in SELECTIONS.values()
            and p.pack.max_keys <= p.top_k
            and p.objective == "none"
            and not p.keep_selection
        ):
            return None  # ours select everything then; a function of the user's may not
        elif self.indexer is None and p.selection is indexer_selection:
            return None
        else:
            k = min(p.top_k, p.pack.max_keys)
            with torch.no_grad():
                inputs = index_inputs, heads.attention_inputs
                indices = p.selection(SelectionContext(self.layer, k, p.pack, *inputs, p.backend, k_scale, self.peers))
            if indices is None:
                return None
        if p.keep_selection and indices is not None:
            p.selected[self.layer] = indices
        return indices

    def _decode(self, heads: Heads, h_ND: Tensor, source: Tensor, pages: PagedStep, p: Pass) -> Tensor:
        """One new token of every sequence: its entries are written, then it attends to what it selects. Nothing is expanded."""
        keys = None
        if self.indexer is not None:
            keys = self.indexer.keys(h_ND, p.rotation, rounded=not pages.quantized_index)
        pages.write(self.layer, heads.entries, keys)
        indices = None
        if p.selection is not dense and self.indexer is not None:
            queries = self.indexer.e4m3_queries if pages.quantized_index else self.indexer.queries

            def choose(rows: slice) -> Tensor:
                q_I, w = queries(source[rows], h_ND[rows], p.rotation.rows(rows))
                table, lens = pages.page_table[rows], pages.lens[rows]
                scores = ops.index_scores_paged(q_I, pages.index[self.layer], w, table, lens, backend=p.backend)
                # always k places, so that a sequence's sums do not depend on how long the others are
                return ops.select_topk(scores, p.top_k, torch.zeros_like(lens), lens, backend=p.backend)

            indices = self.peers.select(h_ND.shape[0], choose)
            if p.keep_selection:
                p.selected[self.layer] = indices
        return heads.up(pages.attend(self.layer, heads.absorbed(), indices, self.scale, self.latent, p.backend))

    def _warmup(self, heads: Heads, index_inputs, p: Pass) -> Tensor:
        """Dense attention; the indexer learns equation (3) from it, layer by layer."""
        assert self.indexer is not None and p.kl_weight is not None
        pack, weight = p.pack, p.kl_weight
        q, k, v = heads.expanded()
        out, lse = ops.dense_attention(
            q, k, v, pack.starts_N, pack.ends_N, self.scale, bounds=pack.bounds, longest=pack.longest, backend=p.backend
        )

        def loss() -> Tensor:
            q_I, k_I, w = index_inputs()
            return ops.indexer_kl_dense_sum(
                q, k, lse, self.scale, q_I, k_I, w, pack.starts_N, pack.ends_N, weight, backend=p.backend
            )

        parameters = tuple(x for x in self.indexer.parameters() if x.requires_grad)
        if torch.is_grad_enabled() and parameters:
            p.kl[self.layer] = LayerLocalLoss.apply(loss, *parameters)
        else:
            p.kl[self.layer] = loss().detach()
        return out

    def _adapt(self, heads: Heads, indices: Tensor, index: tuple[Tensor, Tensor, Tensor], p: Pass) -> Tensor:
        """Sparse attention; the indexer learns equation (4) from its probabilities, the model only from what is read."""
        assert p.kl_weight is not None
        q = heads.absorbed()
        width = self.latent + self.rope
        out, _, kl_N = ops.sparse_attention_kl(
            q, heads.entries.unsqueeze(1), indices, self.scale, width, 0, self.latent, *index, backend=p.backend
        )
        p.kl[self.layer] = (kl_N.detach() * p.kl_weight).sum()
        return heads.up(InjectedKL.apply(out, kl_N, p.kl_weight.to(kl_N.dtype)))
