"""Attention of one layer: project, append, select, attend. The two kinds of it are in `mla.py` and `grouped.py`.

Legend: N query tokens, T keys, D hidden width, H heads, W numbers of a token's entry, V value width, K selected keys.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from tokensieve import ops
from tokensieve.config import UserError
from tokensieve.families import ModelConfig, family_of
from tokensieve.model.context import NOTHING, ForwardContext, LayerResult, Lent
from tokensieve.model.entries import ContiguousKeys, Keys
from tokensieve.model.indexer import Indexer, IndexInputs
from tokensieve.model.kl import InjectedKL, LayerLocalLoss
from tokensieve.model.pack import Pack
from tokensieve.model.rope import Rotation
from tokensieve.model.selection import (
    ONE_GROUP,
    HeadGroup,
    Once,
    SelectionContext,
    check_indices,
    dense,
    indexer,
    is_own,
)

# Sparse prefill takes the masked form up to this many times k keys per query.
# Measured on a GPU (docs/kernels.md), a guess on the CPU (docs/results/cpu.md).
MASKED_FORM_KEYS = {"cpu": 3, "cuda": 4}

Queries = Any  # whatever a family's `project` returns and its other methods read


def check_whole(parameters: Iterable[Tensor]) -> None:
    """UserError if FSDP holds a part of them: an indexer is whole while layers run that are sharded with its own."""
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise UserError(
            "FSDP shards layers apart that share an indexer; shard them together, as tokensieve.train.parallelize does"
        )


class Attention(nn.Module, ABC):
    """Attention of one layer. Parameter names are the published checkpoint's; `indexer` exists in sparse models only.

    borrows: a layer of a sparse model that has no indexer reads the keys that the layer before it reads (config.json
    calls it "shared"). lends: the layer after this one does so.

    Each kind of attention implements the abstract methods: the projection of tokens, and the two forms in which keys
    are read (`tokensieve.model.context.Form`).
    """

    o_proj: nn.Linear
    indexer: Indexer | None

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        family = family_of(config)
        self.layer, self.layers, self.heads = layer, config.num_hidden_layers, config.num_attention_heads
        self.entry = family.entry(config)
        self.head_group: HeadGroup = ONE_GROUP

    def add_indexer(self, config: ModelConfig) -> None:
        """Called last by a family's constructor, so that parameters keep the order of the published checkpoint."""
        family = family_of(config)
        has = [family.has_indexer(config, layer) for layer in range(config.num_hidden_layers)]
        self.indexer = Indexer(config) if has[self.layer] else None
        self.borrows = family.sparse and not has[self.layer]
        self.lends = family.sparse and not all(has[self.layer + 1 : self.layer + 2])

    # implemented by each kind of attention

    @abstractmethod
    def project(self, h_ND: Tensor, rotation: Rotation) -> tuple[Queries, Tensor, Tensor]:
        """Queries, entries (N, W), and the input of the index queries (N, index_source)."""

    @abstractmethod
    def projections(self) -> tuple[Tensor, Tensor]:
        """The matrices behind queries (H, d_k, index_source) and keys (G, d_k, D) in the form that reads entries.

        They leave out norms (but the one in front of the index queries' input), biases and rotations.
        """

    @abstractmethod
    def gathered_queries(self, queries: Queries) -> Tensor:
        """Queries (N, H, d_k) in the form that reads entries as they are cached."""

    @abstractmethod
    def gathered_output(self, queries: Queries, out_NHV: Tensor) -> Tensor:
        """(N, H, value width): the output of attention over entries, in the width that o_proj reads."""

    @abstractmethod
    def per_head(self, queries: Queries, keys: ContiguousKeys, repeat: bool) -> tuple[Tensor, Tensor, Tensor]:
        """q (N, H, D), k (T, G, D), v (T, G, V) of the masked form. repeat: one key-value group per head, so G = H."""

    @abstractmethod
    def softmax_scale(self, rotation: Rotation) -> float:
        """The factor of q . k before the softmax, YaRN's included."""

    @abstractmethod
    def expansion_pays(self, pack: Pack) -> bool:
        """Whether the masked form is cheaper than the gathered one.

        The masked form makes keys and values per head, once per key; the gathered form costs more per query and key.
        """

    # common to all

    def forward(self, h_ND: Tensor, ctx: ForwardContext, lent: Lent = NOTHING) -> tuple[Tensor, LayerResult]:
        """lent: by the layer before."""
        queries, entries_NW, source = self.project(h_ND, ctx.rotation)
        index: IndexInputs | None = None
        if self.indexer is not None:
            index = IndexInputs(self.indexer, source, h_ND, ctx.rotation, ctx.entries.gather)
        # If the indexer learns, selection and loss read the same tensors, computed once and outside of no_grad. They
        # come before the entries, which are needed last if they come from other ranks.
        tensors = index.hold() if index is not None and ctx.objective == "adapt" else None
        keys = ctx.entries.append(self.layer, entries_NW, None if index is None else index.keys)
        kl = indices = None
        if ctx.objective == "warmup":
            teaches = lent.learner if self.borrows else index
            assert teaches is not None
            if self.borrows:
                check_whole(teaches.parameters())
            out, kl = self._warm_up(queries, keys, teaches, ctx)
            lends = Lent(learner=teaches if self.lends else None)
        else:
            tensors = lent.tensors if self.borrows else tensors
            indices = self._select(queries, keys, index, ctx, lent.indices)
            if tensors is not None and indices is not None:
                out, kl = self._adapt(queries, keys, indices, tensors, ctx)
            else:
                out = self._attend(queries, keys, indices, ctx)
            shown = self.lends or not is_own(ctx.selector)  # a selector may read what the layer before selected
            lends = Lent(indices if shown else None, tensors=tensors if self.lends else None)
        return self.o_proj(out.flatten(1)), LayerResult(kl, indices if ctx.keep_indices else None, lent=lends)

    def _select(
        self, queries: Queries, keys: Keys, index: IndexInputs | None, ctx: ForwardContext, before: Tensor | None
    ) -> Tensor | None:
        """(N, K) indices, or None for dense attention. before: those of the layer before.

        A built-in selector is not asked if no query sees more than k keys: attention is dense then. Your own always is.
        No selector is asked in a layer that borrows.
        """
        if ctx.replay is not None:
            return ctx.replay[self.layer]
        if self.borrows and ctx.trace is None:
            return before
        selector = dense if ctx.selector is indexer and self.indexer is None else ctx.selector
        needed = ctx.trace is not None or ctx.keep_indices or ctx.objective == "adapt"
        if not needed and is_own(selector) and keys.all_within(ctx.top_k[self.layer]):
            return None  # the built-in selectors would select every key; a user's function may not
        if selector is dense and ctx.trace is None:
            return None

        def attention() -> tuple[Tensor, float]:
            return self.head_group.all_heads(self.gathered_queries(queries)), self.softmax_scale(ctx.rotation)

        with torch.no_grad():
            divided = self.head_group is not ONE_GROUP
            k = ctx.top_k[self.layer]
            c = SelectionContext(self.layer, self.layers, k, keys, index, Once(attention), before, divided)
            indices = before
            if not self.borrows:
                indices = self.head_group.select(len(c), lambda rows: selector(c if rows is None else c.rows(rows)))
            if indices is not None and ctx.check_selection and not is_own(selector):
                check_indices(selector, c, indices)
            if ctx.trace is not None:
                ctx.trace(c, indices)
        return indices

    def _attend(self, queries: Queries, keys: Keys, indices: Tensor | None, ctx: ForwardContext) -> Tensor:
        """Attention (N, H, value width), in the form of the context, or in the one that costs less.

        Warm-up is always in the masked form, and sparse adaptation in the gathered one; neither comes here.
        """
        scale = self.softmax_scale(ctx.rotation)
        if not isinstance(keys, ContiguousKeys) or not self._masked(keys, indices, ctx):
            return self.gathered_output(queries, keys.gather(self.gathered_queries(queries), indices, scale))
        if indices is not None:
            q, k, v = self.per_head(queries, keys, repeat=True)
            return ops.masked_attention(q, k, v, indices, scale, backend=ctx.backend)[0]
        return self._dense(queries, keys, scale, ctx)[0]

    def _masked(self, keys: ContiguousKeys, indices: Tensor | None, ctx: ForwardContext) -> bool:
        """Whether to read keys in the masked form.

        Decode steps on pages never come here (`PagedKeys`): each would make the keys of its whole context anew.
        """
        if ctx.form != "auto":
            return ctx.form == "masked"
        if indices is None:
            return ctx.pack.bounds is not None or self.expansion_pays(ctx.pack)
        limit = MASKED_FORM_KEYS["cuda" if keys.entries_TW.is_cuda else "cpu"] * indices.shape[1]
        return ctx.pack.max_keys <= limit and self.expansion_pays(ctx.pack)

    def _dense(
        self, queries: Queries, keys: ContiguousKeys, scale: float, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Attention to every visible key, in the masked form. Returns out, logsumexp, and the q and k behind them."""
        q, k, v = self.per_head(queries, keys, repeat=False)
        pack = ctx.pack
        out, lse = ops.dense_attention(
            q, k, v, pack.starts_N, pack.ends_N, scale, bounds=pack.bounds, longest=pack.longest, backend=ctx.backend
        )
        return out, lse, q, k

    def _warm_up(self, queries: Queries, keys: Keys, index: IndexInputs, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """Dense attention, from which the indexer learns equation (3) layer by layer. Returns its output and the KL.

        index: of this layer, or the one that it shares. An indexer that several layers share learns from each of them.
        """
        scale, weight, pack = self.softmax_scale(ctx.rotation), ctx.kl_weight, ctx.pack
        assert isinstance(keys, ContiguousKeys) and weight is not None
        out, lse, q, k = self._dense(queries, keys, scale, ctx)

        def loss() -> Tensor:
            rows = ctx.kl_queries.rows
            q_I, w = index.queries(rows, False)
            return ops.indexer_kl_dense_sum(
                q[rows], k, lse[rows], scale, q_I, index.keys(True), w, pack.starts_N[rows], pack.ends_N[rows], weight,
                backend=ctx.backend,
            )  # fmt: skip

        parameters = tuple(x for x in index.parameters() if x.requires_grad)
        if torch.is_grad_enabled() and parameters:
            return out, LayerLocalLoss.apply(loss, *parameters)
        return out, loss().detach()

    def _adapt(
        self,
        queries: Queries,
        keys: Keys,
        indices: Tensor,
        index: tuple[Tensor, Tensor, Tensor],
        ctx: ForwardContext,
    ) -> tuple[Tensor, Tensor]:
        """Sparse attention, whose probabilities teach the indexer equation (4). Returns its output and the KL.

        The model learns from the selected entries only. Queries that have no KL in this pass are read apart.
        """
        assert ctx.kl_weight is not None and isinstance(keys, ContiguousKeys)
        q, scale = self.gathered_queries(queries), self.softmax_scale(ctx.rotation)
        _, _, d_k, v_start, d_v = self.entry
        rows, others = ctx.kl_queries.rows, ctx.kl_queries.others
        q_I, k_I, w = index
        out, _, kl_N = ops.sparse_attention_kl(
            q[rows], keys.entries_TGE, indices[rows], scale, d_k, v_start, d_v, q_I[rows], k_I, w[rows],
            backend=ctx.backend,
        )  # fmt: skip
        kl = (kl_N.detach() * ctx.kl_weight).sum()
        out = InjectedKL.apply(out, kl_N, ctx.kl_weight.to(kl_N.dtype))
        if others is not None:
            rest, _ = ops.sparse_attention(
                q[others], keys.entries_TGE, indices[others], scale, d_k, v_start, d_v, backend=ctx.backend
            )
            out = out.new_empty(len(q), *out.shape[1:]).index_copy(0, rows, out).index_copy(0, others, rest)
        return self.gathered_output(queries, out), kl
