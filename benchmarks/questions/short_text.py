"""Does short text lose anything?"""

import itertools
from collections.abc import Mapping
from typing import Any

from subject import SMALL_K, Subject, losses, points, show

from tokensieve import evals
from tokensieve.config import ShortSizes
from tokensieve.demo import bundled_texts
from tokensieve.evals import Arm, intervals
from tokensieve.evals.intervals import Estimate
from tokensieve.report.sections import text_of

FEW_KEYS = (32, SMALL_K, 512)  # that short questions are asked with


def short(subject: Subject) -> dict[str, Any]:
    """Loss by tokens seen, answers to short questions, and time, of text around k tokens."""
    found = {"stretches": _stretches(subject), "short": _questions(subject)}
    contexts = [c for c in (256, 512, 1024, 2048, 4096) if c <= 2 * subject.sizes.context]
    models = {"dense": subject.dense, "sparse": subject.sparse}
    token_ms, chunk_ms = evals.context_ms(models, subject.texts[0], contexts)
    times = {"one more token": token_ms, f"a chunk of {evals.CHUNK}": chunk_ms}
    show("Time of sparse over dense attention, the median of 9 tokens and of 3 chunks",
         ("context", *(f"{c:,}" for c in contexts)),
         [(what, *(f"{ms['sparse'][str(c)] / ms['dense'][str(c)]:.2f}" for c in contexts))
          for what, ms in times.items()])  # fmt: skip
    return found | {"ms": times}


def _stretches(subject: Subject) -> list[dict[str, Any]]:
    model, length, ks = subject.sparse, subject.sizes.context, (SMALL_K, subject.sparse.top_k)
    edges = [*(edge for edge in (0, SMALL_K, 256, ks[-1], 1024) if edge < length), length]
    dense = losses(model, "dense", ks[0], subject.texts)
    less = {k: losses(model, "indexer", k, subject.texts) - dense for k in ks}
    rows = [
        {
            "from": a + 1,
            "to": b,
            "ratio": {k: intervals.ratio(less[k][:, a:b].mean(1).tolist()) for k in ks},
            "largest": {k: float(less[k][:, a:b].abs().max()) for k in ks},
        }
        for a, b in itertools.pairwise(edges)
    ]
    show(f"Perplexity over dense attention's, {len(subject.texts)} texts",
         ("tokens seen", *(f"k = {k}" for k in ks), *(f"largest difference of a loss, k = {k}" for k in ks)),
         [(f"{row['from']:,} to {row['to']:,}", *(text_of(vars(e), 4) for e in row["ratio"].values()),
           *(f"{nats:.1e}" for nats in row["largest"].values())) for row in rows])  # fmt: skip
    return rows


def _questions(subject: Subject) -> dict[str, Any]:
    """The suite "short", with fewer keys than its prompts have tokens too."""
    model = subject.sparse
    arms = {"dense": Arm(model, "dense")} | {f"k = {k}": Arm(model, "indexer", k) for k in FEW_KEYS}
    sizes = ShortSizes(prompts=subject.sizes.asked, texts=len(subject.texts), tokens=min(512, subject.sizes.context))
    found = evals.judge_short(arms, subject.tokenizer, bundled_texts(), sizes)
    tasks = dict.fromkeys(row["task"] for row in found["tasks"])
    show(f"Short questions, {sizes.prompts} of each task: share answered, and its difference to dense in points",
         ("task", *arms),
         [(task, *(_scored(row) for row in found["tasks"] if row["task"] == task)) for task in tasks])  # fmt: skip
    return found


def _scored(row: Mapping[str, Any]) -> str:
    score = f"{100 * row['score']['value']:.0f}%"
    return score if row["difference"] is None else f"{score} ({points(Estimate(**row['difference']))})"
