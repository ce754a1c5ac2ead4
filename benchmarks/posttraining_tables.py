"""The tables of benchmarks/posttraining.py, from what its runs left.

Legend: a group is a domain in one mode. Every interval is of 95%. One of a gain is of the paired difference on the same
problems; those of one seed are a cluster if there are several seeds, since its models may err together: "n = 96 in 3".
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tokensieve.evals.intervals import Estimate, clustered_difference, clustered_share
from tokensieve.report.posttrain import MIXED

BINS = 4  # of output tokens, in the range that both arms have
JUDGE = (
    "Every judge of these runs is the scripted one, which checks rubrics by rules, so there is no agreement to report. "
    "With `--set judge.model=MODEL` the table of the runs has that of another judge."
)
WEIGHTS = "The weights of the reward"  # the table that the plot is of
History = list[dict[str, float]]
ByWeight = Mapping[str, Mapping[float, str]]  # by term of the reward and its weight: the name of a run


@dataclass(frozen=True)
class Run:
    """metrics.json, and the rows of each stage of GRPO: by domain, or `MIXED`."""

    metrics: Mapping[str, Any]
    histories: Mapping[str, History]

    @property
    def models(self) -> Mapping[str, Mapping[str, Any]]:
        return self.metrics.get("evaluation", {})


def read(folder: Path) -> dict[str, Run]:
    """The runs in a folder by name, whether they are done or not."""
    runs = {}
    for path in sorted(folder.glob("*/metrics.json")):
        stages = {MIXED: path.parent / "final"} | {
            stage.parent.name: stage for stage in sorted(path.parent.glob("specialists/*/rl"))
        }
        histories = {
            name: json.loads((stage / "history.json").read_text(encoding="utf-8"))
            for name, stage in stages.items()
            if (stage / "history.json").is_file()
        }
        runs[path.parent.name] = Run(json.loads(path.read_text(encoding="utf-8")), histories)
    return runs


def tables(
    runs: Mapping[str, Run], first: str, by_weight: ByWeight, notes: Sequence[str] = ()
) -> tuple[str, dict[str, Any]]:
    """All tables as Markdown, and what is in them. first: the run from which the sequence and others began."""
    arms = {arm: {n: r for n, r in runs.items() if n.startswith("seed-") and n.endswith(arm)} for arm in ARMS}
    parts: dict[str, tuple[str, list[list[Any]]]] = {
        "Specialists, the distilled model, and the mixed stage": gains(arms["sparse"]),
        "Sparse beside dense": beside(arms),
        "Sparse beside dense at equal output tokens": at_equal_tokens(arms),
        "One mixed stage beside one domain after the other": sequential(runs, first),
        WEIGHTS: weights(runs, first, by_weight),
        "The runs": of_runs(runs),
    }
    notes = [*notes, *([] if any("judge_agreement" in run.metrics for run in runs.values()) else [JUDGE])]
    text = "".join(f"- {note}\n" for note in notes)
    figures: dict[str, Any] = {"notes": notes}
    for title, (lead, (head, *rows)) in parts.items():
        text += f"\n## {title}\n\n{lead}\n\n{_markdown(head, rows) if rows else 'Nothing yet.'}\n"
        figures[title] = [dict(zip(head, map(_plain, row), strict=True)) for row in rows]
    stages = dict.fromkeys(stage for run in runs.values() for stage in run.histories)
    figures["output tokens and outcome of every step"] = {
        name: {stage: _curve([run], stage) for stage in stages if stage in run.histories} for name, run in runs.items()
    }
    return text, figures


ARMS = ("sparse", "dense")


def gains(runs: Mapping[str, Run]) -> tuple[str, list[list[Any]]]:
    lead = (
        "Accuracy on held-out problems in %, all seeds together, and paired gains in points. A group in which no "
        "answer of any model scores is beyond this model, and left out of the tables by group. On-policy: distilled "
        "from the specialists on its own answers; it has no figures in a run without `distill.on_policy`."
    )
    models = ("base", "specialist", "distilled", "on-policy", "final")
    pairs = (("specialist", "base"), ("distilled", "specialist"), ("on-policy", "distilled"), ("final", "distilled"))
    rows: list[list[Any]] = [["group", *models, *(f"{a} - {b}" for a, b in pairs), "of the gap closed"]]
    for group in _groups(runs.values(), all_of_them=True):
        names = dict(zip(models, models, strict=True)) | {"specialist": _specialist(group)}
        scores = {model: _scores(runs, name, group) for model, name in names.items()}
        asked = sum(len(s) for by_seed in scores.values() for s in by_seed.values())
        if not any(score > 0 for by_seed in scores.values() for s in by_seed.values() for score in s):
            rows.append([group, f"beyond this model: 0 of {asked} answers", *[""] * (len(rows[0]) - 2)])
            continue
        found = {(a, b): _gain(scores[a], scores[b]) for a, b in pairs}
        closed = _closed(found["distilled", "specialist"], found["final", "distilled"])
        rows.append([group, *(_share(s) for s in scores.values()), *found.values(), closed])
    return lead, rows


def beside(arms: Mapping[str, Mapping[str, Run]]) -> tuple[str, list[list[Any]]]:
    lead = "The same seeds and problems. Accuracy in %, mean output tokens, and sparse less dense in points, paired."
    rows: list[list[Any]] = [["group", "model", *(f"{arm}{what}" for arm in ARMS for what in ("", ", tokens"))]]
    rows[0].append("sparse - dense")
    for group in _groups(run for runs in arms.values() for run in runs.values()):
        for model in ("base", _specialist(group), "distilled", "on-policy", "final"):
            scores = [_scores(arms[arm], model, group) for arm in ARMS]
            tokens = [_tokens(arms[arm], model, group) for arm in ARMS]
            by_seed = [{name.rpartition("-")[0]: s for name, s in found.items()} for found in scores]
            if any(scores):
                cells = [cell for s, t in zip(scores, tokens, strict=True) for cell in (_share(s), t)]
                rows.append([group, model, *cells, _gain(*by_seed)])
    return lead, rows


def at_equal_tokens(arms: Mapping[str, Mapping[str, Run]]) -> tuple[str, list[list[Any]]]:
    lead = (
        f"Steps of GRPO, all seeds together, by their mean output tokens: {BINS} bins over the range that both arms "
        "have. Outcome: its mean over the groups of a step, without the other terms of the reward; mean over the bins "
        "that both arms have, each with the same weight. No interval: steps of one run are not independent."
    )
    rows: list[list[Any]] = [["stage", "output tokens", "bins", "sparse", "sparse steps", "dense", "dense steps"]]
    stages = dict.fromkeys(stage for runs in arms.values() for run in runs.values() for stage in run.histories)
    for stage in stages:
        points = [_curve(arms[arm].values(), stage) for arm in ARMS]
        if not all(points):
            continue
        low = max(min(tokens for tokens, _ in arm) for arm in points)
        high = min(max(tokens for tokens, _ in arm) for arm in points)
        if low > high:
            rows.append([stage, "no steps of equal length", *[""] * 5])
            continue
        binned = [_binned(arm, low, high) for arm in points]
        both = sorted(binned[0].keys() & binned[1].keys())
        cells = [
            cell
            for arm in binned
            for cell in ([fmean(fmean(arm[b]) for b in both), sum(len(arm[b]) for b in both)] if both else ["", 0])
        ]
        rows.append([stage, f"{low:.0f} to {high:.0f}", len(both), *cells])
    return lead, rows


def sequential(runs: Mapping[str, Run], begin: str) -> tuple[str, list[list[Any]]]:
    lead = (
        "From the distilled model of the first seed, with the same problems and budget. Forgotten: a domain's "
        "accuracy at the end of the sequence less that right behind its own stage, in points. Accuracy in %. One seed. "
        "The end has no figures until the last stage is measured on all domains."
    )
    rows: list[list[Any]] = [
        ["group", "place", "distilled", "mixed stage", "behind its own stage", "at the end", "end - own stage",
         "mixed - end"]
    ]  # fmt: skip
    chain = {name: run for name, run in runs.items() if name.startswith("sequential-")}
    if not chain or not (first := _only(runs, begin)):
        return lead, rows
    own = {name.split("-", 2)[2]: (int(name.split("-", 2)[1]), name) for name in chain}
    last = max(own.values())[1]
    everywhere = _groups(first.values(), all_of_them=True)
    done = set(everywhere) <= chain[last].models.get("final", {}).keys()  # another stage is measured on its own domain
    for group in _groups(first.values()):
        place, name = own.get(group.rpartition("-")[0], (0, ""))
        mixed, start = _scores(first, "final", group), _scores(first, "distilled", group)
        after = _scores({name: chain[name]} if name else {}, "final", group)
        end = _scores({last: chain[last]} if done else {}, "final", group)
        gone = _gain(_as_one(end), _as_one(after))
        rows.append([group, place, *map(_share, (start, mixed, after, end)), gone, _gain(_as_one(mixed), _as_one(end))])
    return lead, rows


def weights(runs: Mapping[str, Run], begin: str, by_weight: ByWeight) -> tuple[str, list[list[Any]]]:
    lead = (
        "The mixed stage again, from the same model on the same problems, with another weight of one term. Accuracy in "
        "% over all groups, less that of the config's weights in points; problems of one group are a cluster. Mean "
        "output tokens. Language share: of an answer's letters in the prompt's language, in %, mean over the answers "
        "with prose. One seed."
    )
    rows: list[list[Any]] = [["term", "weight", "accuracy", "less the config's", "output tokens", "language share"]]
    final = {name: run.models.get("final", {}) for name, run in runs.items()}
    scores = {name: {group: one["scores"] for group, one in found.items()} for name, found in final.items()}
    for term, names in by_weight.items():
        for weight, name in names.items():
            if not (groups := [*final.get(name, {}).values()]):
                continue
            tokens = fmean([one["tokens"] for one in groups], [len(one["scores"]) for one in groups])
            spoken = [one["language"] for one in groups if one.get("language")]  # earlier versions have none
            share = 100 * fmean([e["value"] for e in spoken], [e["n"] for e in spoken]) if spoken else ""
            gain = _gain(scores[name], scores.get(begin, {})) if name != begin else ""
            rows.append([term, weight, _share(scores[name]), gain, tokens, share])
    return lead, rows


def of_runs(runs: Mapping[str, Run]) -> tuple[str, list[list[Any]]]:
    lead = (
        "Over all steps of GRPO: the difference of log probabilities between rollout and training, in nats, with "
        "selections replayed in sparse runs. Queries past k: the share that sees more than k keys. Agreement: the "
        "judge's with the rules, Somers' d, n pairs of answers."
    )
    head = ["run", "seconds", "steps", "difference, mean", "largest step", "queries past k", "judge", "agreement"]
    rows: list[list[Any]] = [head]
    for name, run in runs.items():
        steps = [row for rows in run.histories.values() for row in rows if "rollout/logp_difference" in row]
        differences = [row["rollout/logp_difference"] for row in steps]
        past = [row["rollout/queries_past_k"] for row in steps]
        cells = [f"{fmean(differences):.2e}", f"{max(differences):.2e}", fmean(past)] if steps else ["", "", ""]
        seconds = sum(run.metrics.get("seconds", {}).values())
        measured = run.metrics.get("judge_agreement", {}).get("all", {}).get("agreement")
        agreement = Estimate(**measured) if measured else ""
        rows.append([name, round(seconds), len(steps), *cells, run.metrics.get("judge", ""), agreement])
    return lead, rows


def _only(runs: Mapping[str, Run], name: str) -> dict[str, Run]:
    """One run by its name; none if it is not there."""
    return {name: runs[name]} if name in runs else {}


def _groups(runs: Iterable[Run], all_of_them: bool = False) -> list[str]:
    """The groups in which an answer of some model scores, or all of them."""
    found = [(group, figures) for run in runs for by in run.models.values() for group, figures in by.items()]
    return list(dict.fromkeys(group for group, figures in found if all_of_them or any(figures["scores"])))


def _specialist(group: str) -> str:
    return f"specialist-{group.rpartition('-')[0]}"


def _scores(runs: Mapping[str, Run], model: str, group: str) -> dict[str, list[float]]:
    """The scores by run, of those that have them."""
    found = {name: run.models.get(model, {}).get(group) for name, run in runs.items()}
    return {name: figures["scores"] for name, figures in found.items() if figures}


def _as_one(scores: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """The scores of one run, to be paired with those of another."""
    (found,) = scores.values() or ([],)
    return {"one": found}


def _tokens(runs: Mapping[str, Run], model: str, group: str) -> float | str:
    found = [run.models[model][group]["tokens"] for run in runs.values() if group in run.models.get(model, {})]
    return fmean(found) if found else ""


def _share(scores: Mapping[str, Sequence[float]]) -> Estimate | str:
    values, clusters = _flat(scores)
    return _percent(clustered_share(values, clusters)) if values else ""


def _gain(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> Estimate | str:
    """The gain of a over b in points, in the runs that both have."""
    both = [name for name in a if name in b and len(a[name]) == len(b[name])]
    values, clusters = _flat({name: a[name] for name in both})
    before, _ = _flat({name: b[name] for name in both})
    if not values:
        return ""
    return _percent(clustered_difference(values, before, clusters))


def _percent(found: Estimate) -> Estimate:
    low, high = (None if x is None else 100 * x for x in (found.low, found.high))
    return Estimate(100 * found.value, low, high, found.n, found.clusters)


def _flat(scores: Mapping[str, Sequence[float]]) -> tuple[list[float], list[Any]]:
    """All scores, and the cluster of each: its run, or with one run each problem by itself."""
    values = [score for found in scores.values() for score in found]
    names = [name for name, found in scores.items() for _ in found]
    return values, names if len(scores) > 1 else list(range(len(values)))


def _closed(lost: Estimate | str, gained: Estimate | str) -> float | str:
    """The share of what distillation lost that the mixed stage brought back; nothing if it lost nothing."""
    if isinstance(lost, str) or isinstance(gained, str) or lost.value >= 0:
        return ""
    return -gained.value / lost.value


def _curve(runs: Iterable[Run], stage: str) -> list[tuple[float, float]]:
    """(output tokens, outcome) of every step."""
    points = []
    for run in runs:
        for row in run.histories.get(stage, []):
            outcomes = [value for name, value in row.items() if name.startswith("outcome/") and not math.isnan(value)]
            if outcomes and "completions/mean_length" in row:
                points.append((row["completions/mean_length"], fmean(outcomes)))
    return points


def _binned(points: Sequence[tuple[float, float]], low: float, high: float) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for tokens, outcome in points:
        if low <= tokens <= high:
            place = 0 if high == low else min(BINS - 1, int(BINS * (tokens - low) / (high - low)))
            found.setdefault(place, []).append(outcome)
    return found


def _plain(cell: Any) -> Any:
    return cell.to_dict() if isinstance(cell, Estimate) else cell


def _text(cell: Any) -> str:
    if isinstance(cell, Estimate):
        bounds = "" if cell.low is None or cell.high is None else f" ({_number(cell.low)} to {_number(cell.high)})"
        clusters = "" if cell.clusters in (None, cell.n) else f" in {cell.clusters}"
        return f"{_number(cell.value)}{bounds}, n = {cell.n}{clusters}"
    return _number(cell) if isinstance(cell, float) else str(cell)


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) > 1 else f"{value:.2f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
