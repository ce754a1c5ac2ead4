"""Answers to a benchmark's problems, and the figures that stand on them.

Legend: n answers to m problems; those to one problem may err together, and count as a cluster.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from tokensieve.evals.intervals import Estimate, clustered_share, difference, mean

CHI2 = 3.841459  # 95% point of chi-squared with one degree of freedom


@dataclass(frozen=True)
class Graded:
    """An answer's score in [0, 1]; None if there is no answer or no grade, which is not a score of zero.

    tokens: of the answer, thoughts included; None if the harness does not say. level: the problem's rating, if it has
    one.
    """

    problem: str
    score: float | None
    tokens: int | None = None
    level: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def figures(answers: Sequence[Graded], is_rating: bool) -> dict[str, Any]:
    """{"score", "tokens": an Estimate as a dict or None, "problems", "answers", "ungraded": counts, "graded": rows}.

    score: the share of right answers, or with `is_rating` the rating, whose value is None if it is infinite; None if
    nothing was graded. tokens: the mean over problems of the mean of their answers.
    """
    graded = [answer for answer in answers if answer.score is not None]
    counted = _means((answer.problem, float(answer.tokens)) for answer in graded if answer.tokens is not None)
    score = (rating if is_rating else _share)(graded).to_dict() if graded else None
    if score is not None and math.isinf(score["value"]):
        score["value"] = None  # JSON has no infinity; the interval says on which side
    return {
        "score": score,
        "tokens": mean([*counted.values()]).to_dict() if counted else None,
        "problems": len({answer.problem for answer in graded}),
        "answers": len(graded),
        "ungraded": len(answers) - len(graded),
        "graded": [answer.to_dict() for answer in answers],
    }


def _share(graded: Sequence[Graded]) -> Estimate:
    return clustered_share([answer.score or 0.0 for answer in graded], [answer.problem for answer in graded])


def rating(graded: Sequence[Graded]) -> Estimate:
    """The rating R of maximum likelihood, if a problem of level r is solved with probability
    1 / (1 + 10^((r - R) / 400)).

    This is how Codeforces defines the level of a problem: a contestant of that rating solves it in half of the cases.
    The interval holds every R whose log-likelihood is at most 1.92 less than the best. A problem counts once, with the
    mean score of its answers. If all or none are solved the likelihood has no maximum: the value is then infinite, and
    only one end of the interval is finite.
    """
    scores, levels = by_problem(graded), {answer.problem: answer.level or 0.0 for answer in graded}
    points = [(levels[problem], score) for problem, score in scores.items()]

    def loss(r: float) -> float:
        """Minus the log-likelihood."""
        x = [((level - r) * math.log(10) / 400, score) for level, score in points]
        return sum(score * _softplus(z) + (1 - score) * _softplus(-z) for z, score in x)

    share, n = fmean(scores.values()), len(points)
    low_end, high_end = min(levels.values()) - 4000, max(levels.values()) + 4000
    if share in (0.0, 1.0):
        best, least = (low_end, 0.0) if share == 0 else (high_end, 0.0)
    else:
        best = _minimum(loss, low_end, high_end)
        least = loss(best)
    low = None if share == 0 else _crossing(loss, least + CHI2 / 2, best, low_end)
    high = None if share == 1 else _crossing(loss, least + CHI2 / 2, best, high_end)
    value = {0.0: -math.inf, 1.0: math.inf}.get(share, best)
    return Estimate(value, low, high, n)


def compared(a: Sequence[Graded], b: Sequence[Graded]) -> Estimate | None:
    """Mean score of a less that of b on the problems that both have; None if there is none.

    For single answers that are right or wrong: the interval for paired proportions. Else Student's t of the problems'
    differences. n: of problems.
    """
    first, second = by_problem(a), by_problem(b)
    both = sorted(first.keys() & second.keys())
    if not both:
        return None
    x, y = [first[problem] for problem in both], [second[problem] for problem in both]
    if {*x, *y} <= {0.0, 1.0}:
        return difference(x, y)
    return mean([p - q for p, q in zip(x, y)])


def by_problem(answers: Sequence[Graded]) -> dict[str, float]:
    """The mean score of every problem's graded answers."""
    return _means((answer.problem, answer.score) for answer in answers if answer.score is not None)


def _means(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of each problem's values."""
    found: dict[str, list[float]] = {}
    for problem, value in values:
        found.setdefault(problem, []).append(value)
    return {problem: fmean(of_one) for problem, of_one in found.items()}


def read_answers(rows: Sequence[Mapping[str, Any]]) -> list[Graded]:
    """The inverse of `Graded.to_dict`, a list of them."""
    return [Graded(**row) for row in rows]


def _softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def _minimum(loss: Any, low: float, high: float) -> float:
    """Of a convex function, by thirds, to a thousandth."""
    while high - low > 1e-3:
        third = (high - low) / 3
        if loss(low + third) < loss(high - third):
            high -= third
        else:
            low += third
    return (low + high) / 2


def _crossing(loss: Any, level: float, inside: float, outside: float) -> float:
    """Where a convex function that lies below `level` at `inside` and above it at `outside` reaches it."""
    while abs(outside - inside) > 1e-3:
        middle = (inside + outside) / 2
        if loss(middle) < level:
            inside = middle
        else:
            outside = middle
    return (inside + outside) / 2
