"""The criteria, as data: each with the figure that it judges, its bound, and whether it holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

PPL_RATIO = 1.01  # sparse perplexity, against selection by the true attention, of as many keys
NEEDLE_LOSS = 0.03  # needle accuracy that sparse may lose against dense
RECALL = 0.95
CONTROL_GAP = 0.50  # needle accuracy by which a control without a trained selection stays below dense; a window over
# an eighth of the context finds an eighth of the needles and guesses more
MASTERED = 0.60  # tasks of the suite "long" on which the dense arm scores at least this are judged
TASK_LOSS = 0.02  # score that sparse may lose there
TASK_GAP = 0.30  # score by which the controls stay below dense there

NEEDLES_TO_8K, NEEDLES_BEYOND = 0.98, 0.95  # accuracy at every depth decile
CONTEXT_GAIN = 0.02  # nats
COMPLETIONS_PARSE = 0.80
CHAT_ENDS = 0.90


Verdict = Literal["holds", "fails", "within noise"]


@dataclass(frozen=True)
class Criterion:
    """A figure and its bound. low, high, n, clusters: as of the figure's `Estimate`; None if it is not one.

    It holds if the whole interval does, and fails if none of it does. In between, the sample is too small to tell.
    """

    name: str
    value: float
    relation: Literal["<=", ">="]
    bound: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    clusters: int | None = None

    @property
    def verdict(self) -> Verdict:
        if self.n is not None and self.low is None:  # of one text, or of one context's questions
            return "within noise"
        low = self.value if self.low is None else self.low
        high = self.value if self.high is None else self.high
        best, worst = (low, high) if self.relation == "<=" else (-high, -low)
        bound = self.bound if self.relation == "<=" else -self.bound
        # Shares are quotients of small counts: 0.95 - 0.98 must not fail on the last bit.
        return "holds" if worst <= bound + 1e-9 else "fails" if best > bound + 1e-9 else "within noise"

    @property
    def holds(self) -> bool:
        return self.verdict == "holds"


def parity_criteria(metrics: Mapping[str, Any]) -> list[Criterion]:
    """The criteria of the demo, from its metrics: "compared" of `parity.metrics_of`, "recall" and "long".

    Arms that were not run are not judged. Sparse perplexity against dense is no criterion: what k keys cost is a
    property of k, whoever selects them.
    """
    compared = metrics["compared"]
    criteria = []
    if "oracle" in compared["ppl"]:
        name = "sparse perplexity / that of selection by the true attention"
        criteria.append(Criterion(name, **compared["ppl"]["oracle"], relation="<=", bound=PPL_RATIO))
    found = compared["needle"]
    if "dense" in found:
        name = "sparse needles - dense needles"
        criteria.append(Criterion(name, **found["dense"], relation=">=", bound=-NEEDLE_LOSS))
    if "recall" in metrics:
        criteria.append(Criterion("recall of the indexer", metrics["recall"]["last"], ">=", RECALL))
    for arm in ("untrained_indexer", "window"):
        if arm in found:
            criteria.append(Criterion(f"dense needles - {arm} needles", **found[arm], relation=">=", bound=CONTROL_GAP))
    return criteria + (_task_criteria(metrics["long"], metrics["top_k"]) if "long" in metrics else [])


def _task_criteria(long: Mapping[str, Any], top_k: int) -> list[Criterion]:
    """On the tasks that the first arm, the dense model after the same further tokens, has mastered."""
    criteria = []
    controls = (f"window k={top_k}", f"sinks k={top_k}", "untrained_indexer")
    scores = {(row["task"], row["context"]): row["score"]["value"] for row in long["tasks"] if not row["difference"]}
    for row in long["tasks"]:
        found, arm = row["difference"], row["arm"]
        if not found or scores[row["task"], row["context"]] < MASTERED:
            continue
        what = f"{row['task']} in {row['context']:,} tokens"
        if arm == f"sparse k={top_k}":
            criteria.append(Criterion(f"{what}: sparse - dense_adapted", **found, relation=">=", bound=-TASK_LOSS))
        elif arm in controls:
            low, high = (None if found[end] is None else -found[end] for end in ("high", "low"))
            gap = {**found, "value": -found["value"], "low": low, "high": high}
            criteria.append(Criterion(f"{what}: dense_adapted - {arm}", **gap, relation=">=", bound=TASK_GAP))
    return criteria


def acceptance_criteria(figures: Mapping[str, Any]) -> list[Criterion]:
    """The criteria of a base model that really uses its context, from the figures of `longcontext.acceptance`."""
    criteria = []
    for row in figures["needles"]:
        bound = NEEDLES_TO_8K if row["context"] <= 8192 else NEEDLES_BEYOND
        worst = min(x for x in row["by_depth"] if x is not None)
        name = f"needles, {row['needles']} in {row['context']} tokens, worst depth decile"
        criteria.append(Criterion(name, worst, ">=", bound))
    gain = figures["context_gain"]
    name = f"loss with {gain['short']} tokens of context - with {gain['long']}, nats"
    criteria.append(Criterion(name, gain["gain"], ">=", CONTEXT_GAIN))
    if "completions" in figures:
        parsed = figures["completions"]["parsed"]
        criteria.append(Criterion("completions of held-out functions that parse", parsed, ">=", COMPLETIONS_PARSE))
    if "chat" in figures:
        ended = figures["chat"]["ended"]
        criteria.append(Criterion("chat answers that end with the end marker", ended, ">=", CHAT_ENDS))
    return criteria
