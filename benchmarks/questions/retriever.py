"""Does the indexer find what a retriever finds? BM25 over passages of the context against the indexer's keys.

Legend: N queries, T keys, K selected.
"""

import itertools
import re
import sqlite3
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from subject import Subject, percent, points, show
from torch import Tensor

from tokensieve.demo import bundled_texts
from tokensieve.evals import Arm, intervals
from tokensieve.evals.evaluation import repeated
from tokensieve.evals.intervals import Estimate
from tokensieve.evals.suites import asking
from tokensieve.model import LatentCache, SelectionContext
from tokensieve.model.selection import indexer, join, window
from tokensieve.tasks import Documents, PlainEncoder
from tokensieve.tasks.retrieval import LineBounds, NeedleExample, Needles

PASSAGE = 64  # tokens that a passage has at least
TOPS = (1, 2, 4, 8)  # passages that count as found


@dataclass(frozen=True)
class Passages:
    """Stretches of whole lines of a context, each but the last of at least PASSAGE tokens. starts: ascending from 0."""

    starts: list[int]
    texts: list[str]

    @classmethod
    def of(cls, encode: PlainEncoder, bounds: LineBounds, ids: Sequence[int]) -> "Passages":
        starts = [0]
        for at in bounds(torch.tensor(ids).numpy()).tolist():
            if at - starts[-1] >= PASSAGE:
                starts.append(at)
        return cls(starts, [encode.decode(ids[a:b]) for a, b in itertools.pairwise([*starts, len(ids)])])

    def number(self, position: Tensor) -> Tensor:
        """The passage that each position lies in."""
        return torch.bucketize(position, torch.tensor(self.starts), right=True) - 1

    def by_words(self, question: str) -> list[int]:
        """The passages that share a word with the question, best first, by BM25 of SQLite's full-text search."""
        query = " OR ".join(f'"{word}"' for word in sorted({*re.findall(r"\w+", question.lower())}))
        with sqlite3.connect(":memory:") as base:
            base.execute("CREATE VIRTUAL TABLE passages USING fts5(text)")
            base.executemany("INSERT INTO passages(rowid, text) VALUES (?, ?)", enumerate(self.texts))
            found = base.execute(
                "SELECT rowid FROM passages WHERE passages MATCH ? ORDER BY bm25(passages), rowid", (query,)
            )
            return [row[0] for row in found]

    def by_score(self, scores_T: Tensor) -> list[int]:
        """All passages, best first, by the largest index score of their keys."""
        best = torch.full((len(self.starts),), -torch.inf)
        best.scatter_reduce_(0, self.number(torch.arange(len(scores_T))), scores_T, "amax")
        return best.argsort(descending=True, stable=True).tolist()

    def keys(self, ranked: Sequence[int], budget: int, length: int) -> Tensor:
        """The positions, ascending, of the first passages that hold at most `budget` keys together."""
        ends, found = [*self.starts[1:], length], []
        for passage in ranked:
            if len(found) + ends[passage] - self.starts[passage] > budget:
                break
            found += range(self.starts[passage], ends[passage])
        return torch.tensor(sorted(found))


def value_begin(encode: PlainEncoder, example: NeedleExample) -> int:
    """The position in the context of the first token of the needle's value."""
    ids, start = example.context, round(example.depth * len(example.context))
    end = next(end for end in range(start, len(ids)) if example.value in encode.decode(ids[start:end]))
    while example.value in encode.decode(ids[start + 1 : end]):
        start += 1
    return start


@dataclass
class Reading:
    """A selector for a question after `length` tokens of context.

    keys: of the context, that are read with all of the question before; None: those of the indexer. joined: the
    indexer's are read too. last: of the question's tokens, the one before the answer. chosen, scores: its keys in the
    context and the index scores of all of them, of each layer, if the indexer selects.
    """

    length: int
    last: int
    keys: Tensor | None = None
    joined: bool = False
    chosen: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, c: SelectionContext) -> Tensor:
        if self.keys is None:
            own = indexer(c)
            chosen = own[self.last]
            self.chosen[c.layer] = chosen[(chosen >= 0) & (chosen < self.length)].long()
            self.scores[c.layer] = c.rows(slice(self.last, self.last + 1)).scores()[0, : self.length]
            return own
        before = window(c, len(c))
        question = before.where(before >= self.length, torch.tensor(-1, dtype=torch.int32))
        given = join(self.keys.int()[None].expand(len(c), -1), question)
        return join(given, indexer(c)) if self.joined else given


def asked(subject: Subject, passages: Passages, cache: LatentCache, example: NeedleExample) -> dict[str, Any]:
    """One question: the places of the right passage in each ranking, and which arms answer it."""
    model, k, ids = subject.sparse, subject.sparse.top_k, example.context
    begin = value_begin(subject.encode, example)
    right = int(passages.number(torch.tensor(begin)))
    ranked = passages.by_words(subject.encode.decode(example.prompt))
    found = passages.keys(ranked, k, len(ids))
    arms = {
        "indexer": Reading(len(ids), len(example.prompt) - 1),
        "BM25": Reading(len(ids), 0, found),
        "both": Reading(len(ids), 0, found, joined=True),
        "last": Reading(len(ids), 0, torch.arange(len(ids) - k, len(ids))),
    }
    turn = torch.tensor([[*example.prompt, *example.target[:-1]]])
    answered = {}
    for name, reading in arms.items():
        with asking(Arm(model, reading, k)):
            out = model(turn, past_key_values=repeated(cache, 1), use_cache=True, logits_to_keep=len(example.target))
        answered[name] = out.logits[0].argmax(-1).tolist() == [*example.target]
    indexed = arms["indexer"]
    return {
        "answered": answered,
        "bm25": ranked.index(right) if right in ranked else len(passages.starts),
        "layers": [passages.by_score(scores).index(right) for scores in indexed.scores.values()],
        "selected": [bool((chosen == begin).any()) for chosen in indexed.chosen.values()],
        "in_bm25": [float(torch.isin(chosen, found).double().mean()) for chosen in indexed.chosen.values()],
        "of_context": len(found) / len(ids),
    }


def retriever(subject: Subject) -> dict[str, Any]:
    """Needles in contexts that are divided into passages: which ones BM25 and which ones the index scores rank first
    for the question, whether the layers select the answer, and what is answered by reading either.
    """
    sizes, k = subject.sizes, subject.sparse.top_k
    task = Needles(subject.encode, Documents(test=bundled_texts()), context=sizes.haystack, needles=sizes.needles)
    bounds = LineBounds(subject.encode)
    rows: list[dict[str, Any]] = []
    examples = task.examples("test", sizes.haystacks * task.needles)
    for number, begin in enumerate(range(0, len(examples), task.needles)):
        ids, cache = examples[begin].context, LatentCache()
        with asking(Arm(subject.sparse, "indexer", k)):
            subject.sparse(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        passages = Passages.of(subject.encode, bounds, ids)
        for example in examples[begin : begin + task.needles]:
            rows.append({"context": number} | asked(subject, passages, cache, example))
    found = figures(rows)
    layers = range(len(rows[0]["layers"]))
    asked_of = f"{len(rows)} questions in {sizes.haystacks} contexts of {sizes.haystack} tokens"
    show(f"Questions whose passage is among the first; {asked_of}", ("ranked by", *(f"first {top}" for top in TOPS)),
         [("BM25", *map(percent, found["bm25"])),
          *((f"index scores of layer {i}", *map(percent, found["layers"][i])) for i in layers)])  # fmt: skip
    heads = ["any layer", *(f"layer {layer}" for layer in layers)]
    show(f"Questions for which the value's first token is among the {k} keys of the token before the answer", heads,
         [list(map(percent, [found["any"], *found["selected"]]))])  # fmt: skip
    show(f"Selected keys in BM25's first passages, which are {percent(found['of_context'])} of the context", heads[1:],
         [list(map(percent, found["in_bm25"]))])  # fmt: skip
    show(f"Questions answered from the question and at most {k} keys of the context (both: twice as many)",
         ("keys", "answered", "less the indexer's, points"),
         [(name, percent(e), points(found["less"].get(name))) for name, e in found["answered"].items()])  # fmt: skip
    return found | {"rows": rows}


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares of the questions and means, all with intervals over contexts."""
    contexts = [row["context"] for row in rows]
    layers, arms = range(len(rows[0]["layers"])), [*rows[0]["answered"]]
    answered = {arm: [float(row["answered"][arm]) for row in rows] for arm in arms}

    def share(values: Sequence[float]) -> Estimate:
        return intervals.clustered_share([float(value) for value in values], contexts)

    def mean(values: Sequence[float]) -> Estimate:
        by_context = {
            number: [x for x, at in zip(values, contexts, strict=True) if at == number] for number in contexts
        }
        return intervals.mean([statistics.fmean(of) for of in by_context.values()])

    return {
        "bm25": [share([row["bm25"] < top for row in rows]) for top in TOPS],
        "layers": [[share([row["layers"][layer] < top for row in rows]) for top in TOPS] for layer in layers],
        "any": share([any(row["selected"]) for row in rows]),
        "selected": [share([row["selected"][layer] for row in rows]) for layer in layers],
        "in_bm25": [mean([row["in_bm25"][layer] for row in rows]) for layer in layers],
        "of_context": mean([row["of_context"] for row in rows]),
        "answered": {arm: share(values) for arm, values in answered.items()},
        "less": {
            arm: intervals.clustered_difference(answered[arm], answered["indexer"], contexts)
            for arm in arms
            if arm != "indexer"
        },
    }
