"""The agreement of a judge with the rules that check the same rubrics, on a small fixed sample of answers.

Each group gives `PROBLEMS` training problems, and each problem three answers: the right one, that of another problem,
and the first half of the right one.
"""

import logging
from collections.abc import Mapping, Sequence
from itertools import chain, combinations
from statistics import fmean
from typing import Any

from tokensieve.config import UserError
from tokensieve.evals.intervals import Estimate, clustered_difference
from tokensieve.posttrain.groups import Group
from tokensieve.posttrain.judge import Criterion, Judge, Question
from tokensieve.tasks.problems.checks import is_checked, met

log = logging.getLogger("tokensieve")

PROBLEMS = 4  # of a group; even, so that an answer of another problem is in the same language if there are two
ANSWERS = 3  # to a problem
SEED = 0  # so that runs of equal difficulties have the same sample
DIGITS = 6  # of a score: sums of the same numbers in another order are equal


def measure_agreement(judge: Judge, groups: Sequence[Group], known: Mapping[str, Any]) -> dict[str, Any]:
    """{"judge": its name, "groups": by group `figures_of` and the scores by "rules" and by the "judge", "all":
    `figures_of` all of them, "left_out": groups with a rubric and without a sample}. The log has it in a line.

    known: what an earlier call returned. Its groups are not asked again, unless that was another judge.
    """
    known = known if known.get("judge") == judge.name else {}
    figures, left_out = dict(known.get("groups", {})), list(known.get("left_out", []))
    drawn = {group.name: sample(group) for group in groups if group.name not in (*figures, *left_out)}
    samples = {name: questions for name, questions in drawn.items() if questions is not None}
    if known and not samples:
        return dict(known)
    left_out += [name for name, questions in samples.items() if not questions]
    scores = iter(judge.scores([*chain.from_iterable(samples.values())]))
    for name, questions in samples.items():
        if questions:
            rules, judged = [ruled(question) for question in questions], [_rounded(next(scores)) for _ in questions]
            figures[name] = figures_of(rules, judged) | {"rules": rules, "judge": judged}
    every = ([*chain.from_iterable(of[by] for of in figures.values())] for by in ("rules", "judge"))
    found = {"judge": judge.name, "groups": figures, "all": figures_of(*every), "left_out": left_out}
    log.info("%s", _line(found))
    return found


def sample(group: Group) -> list[Question] | None:
    """The answers to judge, `ANSWERS` to a problem; None if no problem has a rubric.

    A problem without a right answer to show is left out, and so is one with a criterion that no rule checks. No answers
    at all if fewer than two problems are left.
    """
    problems = {problem.item.key: problem.item for problem in group.examples("train", PROBLEMS, SEED)}
    if not any(item.rubric for item in problems.values()):
        return None
    items = [i for i in problems.values() if i.rubric and i.answer and all(map(is_checked, i.rubric))]
    if len(items) < 2:
        return []
    questions = []
    for place, item in enumerate(items):
        other = items[(place + len(items) // 2) % len(items)]
        half = item.answer[: (len(item.answer) + 1) // 2]
        rubric = tuple(map(Criterion, item.rubric))
        questions += [Question(item.question, answer, rubric) for answer in (item.answer, other.answer, half)]
    return questions


def ruled(question: Question) -> float:
    """The share of the criteria that rules find met, which is the scripted judge's score."""
    return round(fmean(met(criterion.text, question.answer) for criterion in question.rubric), DIGITS)


def figures_of(rules: Sequence[float], judged: Sequence[float | None]) -> dict[str, Any]:
    """What the scores of the same answers by both show; None in `judged` is a missing one. `ANSWERS` to each problem.

    `answers` that both scored, `missing` scores, `difference`: the mean of |judge - rules|, None without an answer, and
    `agreement`: `somers_d`.
    """
    apart = [abs(a - b) for a, b in zip(rules, judged, strict=True) if b is not None]
    agreement = somers_d(rules, judged)
    return {
        "answers": len(apart),
        "missing": len(judged) - len(apart),
        "difference": fmean(apart) if apart else None,
        "agreement": None if agreement is None else agreement.to_dict(),
    }


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, DIGITS)


def somers_d(rules: Sequence[float], judged: Sequence[float | None]) -> Estimate | None:
    """Somers' d of the judge: (concordant - discordant) / all, of the pairs of answers that rules score differently.

    1: the judge has every such pair in the same order, -1: in the other one, 0: as often in either, or all its scores
    are equal. A pair is of one problem, as GRPO compares answers of one prompt alone; the pairs of a problem are a
    cluster, and n counts pairs. None if there is no pair. Source: Somers, American Sociological Review 27 (1962) 799.
    """
    concordant, discordant, problems = [], [], []
    for place in range(0, len(rules), ANSWERS):
        of = slice(place, place + ANSWERS)
        for (a, x), (b, y) in combinations(zip(rules[of], judged[of], strict=True), 2):
            if a != b and x is not None and y is not None:
                concordant.append(float((a - b) * (x - y) > 0))
                discordant.append(float((a - b) * (x - y) < 0))
                problems.append(place)
    return clustered_difference(concordant, discordant, problems) if problems else None


def check_agreement(found: Mapping[str, Any], wanted: float) -> None:
    """UserError for a judge that agrees less than is wanted, or whose agreement no answer shows. wanted: 0 for any."""
    agreement = found["all"]["agreement"]
    if not wanted or (agreement is not None and agreement["value"] >= wanted):
        return
    if agreement is None:
        why = "cannot be compared with the rules, as no answer of the sample can be scored by both"
        raise UserError(f"judge {found['judge']} {why}; set judge.agreement to 0, or name another judge")
    raise UserError(
        f"judge {found['judge']} agrees too little with the rules: {_shown(found['all'])}, and judge.agreement is "
        f"{wanted:g}; name another judge, or accept it with a lower judge.agreement"
    )


def _line(found: Mapping[str, Any]) -> str:
    groups = "; ".join(f"{name} {_shown(figures)}" for name, figures in found["groups"].items())
    left_out = f"; left out, as rules cannot check it: {', '.join(found['left_out'])}" if found["left_out"] else ""
    return f"judge {found['judge']} beside the rules: {_shown(found['all'])}{groups and f' ({groups})'}{left_out}"


def _shown(figures: Mapping[str, Any]) -> str:
    agreement, missing = figures["agreement"], figures["missing"]
    if agreement is None:
        shown = "no agreement measured"
    elif agreement["low"] is None:
        shown = f"Somers' d {agreement['value']:.2f}"
    else:
        shown = f"Somers' d {agreement['value']:.2f} ({agreement['low']:.2f} to {agreement['high']:.2f})"
    apart = "" if figures["difference"] is None else f", mean difference {figures['difference']:.2f}"
    return f"{shown}{apart}, {figures['answers']} answers" + (f", {missing} without a score" if missing else "")
