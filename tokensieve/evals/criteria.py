"""The criteria, as data: each with the figure that it judges, its bound, and whether it holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

PPL_RATIO = 1.02  # sparse perplexity, against the better of dense and dense_adapted
NEEDLE_LOSS = 0.03  # needle accuracy that sparse may lose against dense
RECALL = 0.95
CONTROL_GAP = 0.60  # needle accuracy by which a control without a trained selection stays below dense

NEEDLES_TO_8K, NEEDLES_BEYOND = 0.98, 0.95  # accuracy at every depth decile
CONTEXT_GAIN = 0.02  # nats
COMPLETIONS_PARSE = 0.80
CHAT_ENDS = 0.90


@dataclass(frozen=True)
class Criterion:
    name: str
    value: float
    relation: Literal["<=", ">="]
    bound: float

    @property
    def holds(self) -> bool:
        return self.value <= self.bound if self.relation == "<=" else self.value >= self.bound


def parity_criteria(metrics: Mapping[str, Any]) -> list[Criterion]:
    """The criteria of the demo, from its metrics: {arm: {"ppl", "needle"}, "recall": {"last"}}.

    Arms that were not run are not judged.
    """
    dense, sparse = metrics["dense"], metrics["sparse"]
    better = min(metrics[arm]["ppl"] for arm in ("dense", "dense_adapted") if arm in metrics)
    criteria = [
        Criterion("sparse perplexity / the better dense one", sparse["ppl"] / better, "<=", PPL_RATIO),
        # Shares are quotients of small counts: 0.95 - 0.98 must not fail on the last bit.
        Criterion("sparse needles - dense needles", round(sparse["needle"] - dense["needle"], 9), ">=", -NEEDLE_LOSS),
    ]
    if "recall" in metrics:
        criteria.append(Criterion("recall of the indexer", metrics["recall"]["last"], ">=", RECALL))
    for arm in ("untrained_indexer", "window"):
        if arm in metrics:
            gap = round(dense["needle"] - metrics[arm]["needle"], 9)
            criteria.append(Criterion(f"dense needles - {arm} needles", gap, ">=", CONTROL_GAP))
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
