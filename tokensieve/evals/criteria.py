"""What has to hold, as data: each criterion with the figure it judges, its bound, and whether it holds."""

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
    """The criteria of the demo, from its metrics: {arm: {"ppl", "needle"}, "recall": {"last"}}. Arms that were not
    run are not judged.
    """
    dense, sparse = metrics["dense"], metrics["sparse"]
    better = min(metrics[arm]["ppl"] for arm in ("dense", "dense_adapted") if arm in metrics)
    found = [
        Criterion("sparse perplexity / the better dense one", sparse["ppl"] / better, "<=", PPL_RATIO),
        # Shares are quotients of small counts: 0.95 - 0.98 must not fail on the last bit.
        Criterion("sparse needles - dense needles", round(sparse["needle"] - dense["needle"], 9), ">=", -NEEDLE_LOSS),
    ]
    if "recall" in metrics:
        found.append(Criterion("recall of the indexer", metrics["recall"]["last"], ">=", RECALL))
    for arm in ("untrained_indexer", "window"):
        if arm in metrics:
            gap = round(dense["needle"] - metrics[arm]["needle"], 9)
            found.append(Criterion(f"dense needles - {arm} needles", gap, ">=", CONTROL_GAP))
    return found


def acceptance_criteria(figures: Mapping[str, Any]) -> list[Criterion]:
    """The criteria of a base model that really uses its context, from what `longcontext.acceptance` returns."""
    found = []
    for row in figures["needles"]:
        bound = NEEDLES_TO_8K if row["context"] <= 8192 else NEEDLES_BEYOND
        worst = min(x for x in row["by_depth"] if x is not None)
        found.append(
            Criterion(f"needles, {row['needles']} in {row['context']} tokens, worst depth decile", worst, ">=", bound)
        )
    gain = figures["context_gain"]
    found.append(
        Criterion(
            f"loss with {gain['short']} tokens of context - with {gain['long']}, nats", gain["gain"], ">=", CONTEXT_GAIN
        )
    )
    found.append(
        Criterion(
            "completions of held-out functions that parse", figures["completions"]["parsed"], ">=", COMPLETIONS_PARSE
        )
    )
    found.append(Criterion("chat answers that end with the end marker", figures["chat"]["ended"], ">=", CHAT_ENDS))
    return found
