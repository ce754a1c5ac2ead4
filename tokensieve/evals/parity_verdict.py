"""Whether sparse attention is as good as dense, for each k: only if prompts are longer and a control does worse."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from tokensieve.evals.criteria import MASTERED, Criterion
from tokensieve.evals.intervals import Estimate


def verdicts(figures: Mapping[str, Any], ppl_loss: float, task_loss: float) -> list[dict[str, Any]]:
    """For each k whether the indexer's choice is as good as dense attention, within the two losses.

    "parity": every 95% interval lies within its bound, and the control (the last k keys) misses one on the same
    prompts. "no parity": an interval lies beyond its bound. "undecided": too few prompts, a control that does as well,
    no prompt that was longer than k, or no task that could be judged. Judged are the perplexity, and tasks on which
    dense attention scores at least `MASTERED` and whose prompts are all longer than k.

    figures: "context", "top_k", "texts" and "tasks" of `judge_parity`.

    Returns [{"k", "verdict", "reason", "criteria": [`Criterion` with "verdict"], "left_out": [why a task is not
    judged]}].
    """
    found = []
    for k in figures["top_k"]:
        criteria, left_out = _criteria(figures, "sparse", k, ppl_loss, task_loss)
        control, _ = _criteria(figures, "window", k, ppl_loss, task_loss)
        verdict, reason = _verdict(criteria, control, k, figures["context"])
        rows = [asdict(c) | {"verdict": c.verdict} for c in criteria]
        found.append({"k": k, "verdict": verdict, "reason": reason, "criteria": rows, "left_out": left_out})
    return found


def _verdict(criteria: list[Criterion], control: list[Criterion], k: int, context: int) -> tuple[str, str]:
    if not criteria:
        return "undecided", f"prompts of {context:,} tokens are not longer than k = {k:,}, so nothing was selected"
    failed = [c.name for c in criteria if c.verdict == "fails"]
    unsure = [c.name for c in criteria if c.verdict == "within noise"]
    if failed:
        return "no parity", f"worse than allowed in {', '.join(failed)}"
    if unsure:
        return "undecided", f"too few prompts to tell in {', '.join(unsure)}"
    if len(criteria) == 1:
        return "undecided", "no task could be judged, and perplexity alone does not show what selection loses"
    if all(c.verdict != "fails" for c in control):
        return "undecided", "the last k keys are not clearly worse, so these prompts do not need a selection"
    return "parity", f"all {len(criteria)} intervals lie within their bounds, and the last k keys miss one"


def _criteria(
    figures: Mapping[str, Any], kind: str, k: int, ppl_loss: float, task_loss: float
) -> tuple[list[Criterion], list[str]]:
    """What an arm is judged by, and the tasks that do not judge it."""
    if figures["context"] - 1 <= k:
        return [], []
    arm = f"{kind} k={k}"
    texts = next(row for row in figures["texts"] if row["arm"] == arm)
    criteria, left_out = [Criterion("perplexity", **_estimate(texts["ratio"]), relation="<=", bound=1 + ppl_loss)], []
    dense = {row["task"]: row["score"]["value"] for row in figures["tasks"] if row["arm"] == "dense"}
    for row in figures["tasks"]:
        if row["arm"] != arm:
            continue
        if row["shortest"] <= k:
            left_out.append(f"{row['task']}: a prompt of {row['shortest']:,} tokens is not longer than k")
        elif dense[row["task"]] < MASTERED:
            left_out.append(f"{row['task']}: not measurable with this model, dense scores {dense[row['task']]:.0%}")
        else:
            criteria.append(Criterion(row["task"], **row["difference"], relation=">=", bound=-task_loss))
    return criteria, left_out


def _estimate(found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an `Estimate`, without what it was made of. Old ones do not have all."""
    return {field.name: found[field.name] for field in fields(Estimate) if field.name in found}
