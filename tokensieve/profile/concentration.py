"""How concentrated attention is: the mass that its best keys hold, and how alike the best keys of close layers are.

Legend: R measured queries, T keys, K the largest k, J values of k, B stretches of positions, one begins at each k.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from tokensieve import cost
from tokensieve.config import UserError
from tokensieve.evals import OnProgress, intervals
from tokensieve.evals.evaluation import evaluating
from tokensieve.evals.intervals import Estimate
from tokensieve.model import DecoderForCausalLM, SelectionContext, selecting

ROWS = 128  # queries whose probabilities over all keys are held at a time
REACH = 3  # layers behind a layer that are tried with its best keys
REHEARSAL = 1024  # tokens of the pass that is timed first
FEWEST = 8  # texts that have to fit into the time; if they do not, all are cut shorter

Pair = tuple[int, int]  # (layer whose best keys, layer whose attention)


class Watcher:
    """A selector that only watches one text: it returns None, which leaves attention dense.

    `held`: sums over queries of the mass that the k best keys of a layer hold in its own attention, or in that of a
    layer behind it. `common`: sums of |S and S'| / k, of both layers' own best keys. Both are (B, J) float64 for a pair
    of layers. `count_B`: measured queries.
    """

    def __init__(self, ks: Sequence[int], queries: int):
        self.ks, self.queries = tuple(ks), queries
        self.held: dict[Pair, Tensor] = {}
        self.common: dict[Pair, Tensor] = {}
        self.count_B = torch.zeros(len(self.ks), dtype=torch.int64)
        self._behind: deque[tuple[int, list[Tensor]]] = deque(maxlen=REACH)

    def __call__(self, c: SelectionContext) -> None:
        visible_N = c.ends_N - c.starts_N
        rows = torch.nonzero(visible_N > self.ks[0]).flatten()
        if not len(rows):
            return
        if len(rows) > self.queries:
            # The middles of equal stretches: the ends of the range would count for more than their share.
            rows = rows[((torch.arange(self.queries, device=rows.device) + 0.5) * len(rows) / self.queries).long()]
        ks_J = torch.tensor(self.ks, device=rows.device)
        stretch_R = torch.searchsorted(ks_J, visible_N[rows].long()) - 1  # the last k that is less than a query sees
        self.count_B = torch.bincount(stretch_R, minlength=len(self.ks))
        best: list[Tensor] = []
        for part, (r, stretch) in enumerate(zip(rows.split(ROWS), stretch_R.split(ROWS), strict=True)):
            mass_RT = c.rows(r).head_mass()
            own_RK = mass_RT.topk(min(self.ks[-1], mass_RT.shape[1]), dim=1).indices  # the best first
            self._add(self.held, (c.layer, c.layer), stretch, self._held(mass_RT, own_RK))
            for layer, orders in self._behind:
                other_RK = orders[part].long()
                self._add(self.held, (layer, c.layer), stretch, self._held(mass_RT, other_RK))
                self._add(self.common, (layer, c.layer), stretch, self._common(mass_RT, own_RK, other_RK, ks_J))
            best.append(own_RK.int())
        self._behind.append((c.layer, best))

    def _held(self, mass_RT: Tensor, order_RK: Tensor) -> Tensor:
        """(R, J): the mass of the first k positions of `order_RK`. Of a k beyond K it is that of all."""
        sums_RK = mass_RT.gather(1, order_RK).double().cumsum(1)
        return sums_RK[:, [min(k, sums_RK.shape[1]) - 1 for k in self.ks]]

    def _common(self, mass_RT: Tensor, own_RK: Tensor, other_RK: Tensor, ks_J: Tensor) -> Tensor:
        """(R, J): the share of the k best positions of one order that are among the k best of the other."""
        place_K = torch.arange(own_RK.shape[1], device=own_RK.device).expand_as(own_RK)
        rank_RT = torch.full_like(mass_RT, own_RK.shape[1], dtype=torch.int64).scatter_(1, own_RK, place_K)
        worse_RK = torch.maximum(rank_RT.gather(1, other_RK), place_K)  # a position is in both sets if this is < k
        return torch.stack([(worse_RK < k).sum(1) for k in self.ks], 1).double() / ks_J

    def _add(self, sums: dict[Pair, Tensor], pair: Pair, stretch_R: Tensor, values_RJ: Tensor) -> None:
        zero = values_RJ.new_zeros(len(self.ks), len(self.ks))
        sums[pair] = sums.get(pair, zero).index_add(0, stretch_R, values_RJ)


@dataclass(frozen=True)
class TextFigures:
    """One text's means over the queries that see more than k keys, by pair of layers and k; NaN if none does.

    tokens: its length. queries: measured in each layer. by_stretch[b][j]: mass of the best ks[j] keys, layers averaged,
    of queries that see more than ks[b] keys and at most ks[b + 1]; 1 if they see no more than ks[j].
    """

    tokens: int
    queries: int
    held: dict[Pair, list[float]]
    common: dict[Pair, list[float]]
    by_stretch: list[list[float]]

    @classmethod
    def of(cls, watcher: Watcher, tokens: int) -> "TextFigures":
        size = len(watcher.ks)
        reached_BJ = torch.ones(size, size, dtype=torch.float64).tril()  # stretch b sees more than ks[j] keys: b >= j
        count_B1 = watcher.count_B.cpu()[:, None]

        def means(sums: dict[Pair, Tensor]) -> dict[Pair, list[float]]:
            queries_J = (count_B1 * reached_BJ).sum(0)
            return {pair: ((x.cpu() * reached_BJ).sum(0) / queries_J).tolist() for pair, x in sums.items()}

        own = torch.stack([x for (a, b), x in watcher.held.items() if a == b]).mean(0).cpu() / count_B1
        by_stretch = torch.where(reached_BJ.bool() | own.isnan(), own, 1.0)
        queries = int(watcher.count_B.sum())
        return cls(tokens, queries, means(watcher.held), means(watcher.common), by_stretch.tolist())


@dataclass(frozen=True)
class Concentration:
    """Figures of a sample of texts, all with at least one query that sees more than ks[0] keys.

    context: tokens at which texts were cut. wanted: texts that were asked for. seconds: that the measurement took.
    flops_per_second: of these passes, counted by `cost`.
    """

    ks: tuple[int, ...]
    layers: int
    texts: tuple[TextFigures, ...]
    context: int
    wanted: int
    seconds: float
    flops_per_second: float

    def mass(self, k: int) -> Estimate:
        """Mass of the best k keys, mean over layers and queries that see more than k, its interval over texts.

        If no query sees more than k keys, all of them are held: 1, from 0 texts.
        """
        means = [
            fmean(text.held[layer, layer][self.ks.index(k)] for layer in range(self.layers)) for text in self.past(k)
        ]
        return intervals.mean(means) if means else Estimate(1.0, None, None, 0)

    def past(self, k: int) -> list[TextFigures]:
        """The texts with queries that see more than k keys."""
        j = self.ks.index(k)
        return [text for text in self.texts if text.held[0, 0][j] == text.held[0, 0][j]]

    def pair(self, k: int, source: int, layer: int, common: bool = False) -> float:
        """Mean over texts of the mass of `layer` that the k best keys of `source` hold, or of what they have in common.

        Layers at most `REACH` apart, and a k that `past` has texts for.
        """
        j = self.ks.index(k)
        return fmean((text.common if common else text.held)[source, layer][j] for text in self.past(k))

    def loss(self, k: int, source: int, layer: int) -> float:
        """The share of the mass of a layer's own best k keys that it loses by those of `source`."""
        return 1.0 - self.pair(k, source, layer) / self.pair(k, layer, layer)

    def to_dict(self) -> dict[str, Any]:
        known = [k for k in self.ks if self.past(k)]
        near = range(self.layers - 1)
        return {
            "top_k": list(self.ks),
            "texts": len(self.texts),
            "texts_wanted": self.wanted,
            "context": self.context,
            "queries": sum(text.queries for text in self.texts),
            "seconds": self.seconds,
            "mass": {str(k): self.mass(k).to_dict() for k in self.ks},
            "mass_by_layer": {str(k): [self.pair(k, i, i) for i in range(self.layers)] for k in known},
            "mass_by_position": self._by_position(),
            "overlap": {str(k): [self.pair(k, i, i + 1, common=True) for i in near] for k in known},
            "loss": {str(k): [self.loss(k, i, i + 1) for i in near] for k in known},
        }

    def _by_position(self) -> list[dict[str, Any]]:
        """{"from", "to": keys that the queries see, "texts", "mass": one share for each k} for each stretch."""
        rows = []
        for b, begin in enumerate(self.ks):
            means = [text.by_stretch[b] for text in self.texts if text.by_stretch[b][b] == text.by_stretch[b][b]]
            if means:
                end = self.ks[b + 1] if b + 1 < len(self.ks) else self.context
                mass = [fmean(column) for column in zip(*means, strict=True)]
                rows.append({"from": begin + 1, "to": end, "texts": len(means), "mass": mass})
        return rows


def measure(
    model: DecoderForCausalLM,
    texts: Sequence[Tensor],
    ks: Sequence[int],
    queries: int,
    seconds: float,
    on_progress: OnProgress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Concentration:
    """The mass of the model's attention that the k best keys hold, for each k:

        mean over t of  max_{|S| = k} sum_{s in S} p[t,s],   p = mean over heads of dense attention's probabilities

    over queries t with more than k visible keys, and the same mass if S is chosen by the attention of a layer before.
    p is the target of equation (3). A sparse model attends densely here. Memory is linear in the context.

    Args:
        texts: int64 (S) each, in the order in which they are taken while there is time.
        ks: ascending; a text of at most ks[0] tokens tells nothing, so none may be that short.
        queries: measured in each layer of each text, evenly spaced.
        seconds: for all of it. A short pass is timed first. If not even `FEWEST` texts would fit, texts are cut
            shorter. At least one is measured, however long it takes.

    Raises:
        UserError: a text that is too short, or attention that is not finite.
    """
    if any(len(text) <= ks[0] for text in texts):
        raise UserError(f"a text of at most {ks[0]} tokens has nothing to select; leave it out")
    if not texts:
        return Concentration(tuple(ks), len(model.model.layers), (), 0, 0, 0.0, 0.0)
    shape = cost.shape_of(model.config)

    def flops(tokens: int) -> float:
        measured = min(queries, tokens) * tokens * shape.layers * cost.attention_flops_per_key(shape, "mqa")
        return cost.forward_flops(shape, tokens, sparse=False, logits=0) + measured

    begin = clock()
    longest = max(len(text) for text in texts)
    short = next(text for text in texts if len(text) == longest)[: max(REHEARSAL, ks[0] + 1)]
    _watch(model, short, ks, queries)
    rate = flops(len(short)) / max(clock() - begin, 1e-6)
    context = longest
    fewest = min(FEWEST, len(texts))
    while context // 2 > ks[0] and fewest * fmean(flops(min(len(t), context)) for t in texts) > rate * seconds:
        context //= 2
    figures: list[TextFigures] = []
    spent, started = 0.0, clock()
    for text in texts:
        piece = text[:context]
        if figures and clock() - begin + flops(len(piece)) / rate > seconds:
            break
        figures.append(_watch(model, piece, ks, queries))
        spent += flops(len(piece))
        rate = spent / max(clock() - started, 1e-6)
        if on_progress is not None:
            on_progress("text", len(figures), len(texts))
    return Concentration(tuple(ks), shape.layers, tuple(figures), context, len(texts), clock() - begin, rate)


def _watch(model: DecoderForCausalLM, ids_S: Tensor, ks: Sequence[int], queries: int) -> TextFigures:
    watcher = Watcher(ks, queries)
    with evaluating(model), selecting(model, watcher):
        model.model(input_ids=ids_S[None].to(model.lm_head.weight.device))
    if not all(bool(sums.isfinite().all()) for sums in watcher.held.values()):
        raise UserError("the model's attention is not finite; are its weights damaged, or too large for their dtype?")
    return TextFigures.of(watcher, len(ids_S))
