"""Which inputs want dense attention? A rule on the mass that `tokensieve profile` measures."""

import itertools
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from subject import SMALL_K, Subject, losses, percent, show
from torch import Tensor

from tokensieve.data import read_documents
from tokensieve.demo import bundled_texts
from tokensieve.evals import intervals
from tokensieve.evals.intervals import Estimate
from tokensieve.profile.concentration import measure
from tokensieve.report.sections import text_of
from tokensieve.tasks import Documents
from tokensieve.tasks.retrieval import Needles
from tokensieve.tasks.words import THINGS

DOCS = Path(__file__).resolve().parents[2] / "docs"
LIMIT = 0.01  # of perplexity that counts as little
THRESHOLDS = (0.70, 0.75, 0.80, 0.85, 0.90, 0.95)


def kinds_of(subject: Subject) -> dict[str, list[Tensor]]:
    """Inputs of several kinds, all as long as the texts."""
    encode, length, count = subject.encode, subject.sizes.context, subject.sizes.few
    rng = random.Random("kinds of input")
    prose = [token for document in read_documents(f"{DOCS}/**/*.md", "all") for token in encode(document.text)]

    def drawn(write: Callable[[], str]) -> list[Tensor]:
        """Each text is written from more pieces than fit into it."""
        return [torch.tensor([*encode.begin, *encode(write())][:length]) for _ in range(count)]

    def cut(ids: Sequence[int]) -> list[Tensor]:
        body = length - len(encode.begin)
        return [torch.tensor([*encode.begin, *ids[i * body : (i + 1) * body]]) for i in range(count)]

    def shuffled(text: Tensor) -> Tensor:
        lines = encode.decode(text[len(encode.begin) :].tolist()).splitlines(keepends=True)
        ids = [*encode.begin, *encode("".join(rng.sample(lines, len(lines))))]
        return torch.tensor([*ids, *ids][:length])  # cut differently, the same text may be a few tokens shorter

    needles = Needles(encode, Documents(test=bundled_texts()), context=length + 512)
    contexts = [example.context[:length] for example in needles.examples("test", count * needles.needles)]
    return {
        "Python": subject.texts[:count],
        "Python with 16 needles": [torch.tensor(ids) for ids in contexts[:: needles.needles]],
        "Python, its lines shuffled": [shuffled(text) for text in subject.texts[:count]],
        "documents in English": cut(prose),
        "words at random": drawn(lambda: " ".join(rng.choices(THINGS, k=length))),
        "numbers at random": drawn(
            lambda: "\n".join(f"{rng.random():.4f},{rng.randrange(10**5)}" for _ in range(length // 4))
        ),
    }


def dense(subject: Subject) -> dict[str, Any]:
    """The mass that `profile` measures of each input, beside what selection costs there in perplexity."""
    model, ks = subject.sparse, (SMALL_K, subject.sparse.top_k)
    kinds, layers = kinds_of(subject), range(len(model.model.layers))
    everything = [text for texts in kinds.values() for text in texts]
    found = iter(measure(model, everything, ks, subject.sizes.queries, seconds=float("inf")).texts)
    inputs, rows = [], []
    for kind, texts in kinds.items():
        figures = list(itertools.islice(found, len(texts)))
        full = losses(model, "dense", ks[0], texts)
        for place, k in enumerate(ks):
            masses = [statistics.fmean(text.held[layer, layer][place] for layer in layers) for text in figures]
            extra = (losses(model, "indexer", k, texts) - full)[:, k:].mean(1).tolist()
            inputs += [
                {"input": f"{kind} {number}", "k": k, "mass": mass, "log_ratio": nats}
                for number, (mass, nats) in enumerate(zip(masses, extra, strict=True))
            ]
            rows.append((kind, str(k), text_of(vars(intervals.mean(masses))), text_of(vars(intervals.ratio(extra)))))
    show(f"{subject.sizes.few} inputs of each kind, {subject.sizes.context} tokens",
         ("input", "k", "mass of the best k", "perplexity over dense's"), rows)  # fmt: skip
    rules = {threshold: [_little_lost(inputs, threshold, above) for above in (True, False)] for threshold in THRESHOLDS}
    show(f"Inputs, each with both k, that lose at most {LIMIT:.0%} of perplexity",
         ("threshold of the mass", "at or above it", "n", "below it", "n"),
         [(f"{threshold:.2f}", *(cell for side in sides for cell in _cells(side)))
          for threshold, sides in rules.items()])  # fmt: skip
    order = {k: _rank_correlation([of for of in inputs if of["k"] == k]) for k in ks}
    print("\nRank correlation of mass and loss: " + ", ".join(f"{r:.2f} (k = {k})" for k, r in order.items()))
    return {"inputs": inputs, "rules": rules, "rank_correlation": order}


def _little_lost(inputs: Sequence[Mapping[str, Any]], threshold: float, above: bool) -> Estimate | None:
    """The share of the inputs on one side of a threshold that lose little; None if none is there."""
    side = [of for of in inputs if (of["mass"] >= threshold) == above]
    lost = [float(of["log_ratio"] <= math.log1p(LIMIT)) for of in side]
    return intervals.clustered_share(lost, [of["input"] for of in side]) if side else None


def _cells(side: Estimate | None) -> tuple[str, str]:
    return ("", "0") if side is None else (percent(side), str(side.n))


def _rank_correlation(points: Sequence[Mapping[str, Any]]) -> float:
    """Spearman's, of mass and loss."""
    ranks = [torch.tensor([p[key] for p in points]).argsort().argsort().tolist() for key in ("mass", "log_ratio")]
    return statistics.correlation(*ranks)
