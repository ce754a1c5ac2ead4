"""One page that shows what a run lost and gained: self-contained HTML, figures inline, light and dark."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tokensieve import cost
from tokensieve.evals.criteria import RECALL, Criterion, parity_criteria
from tokensieve.evals.parity import ARMS
from tokensieve.evals.timing import CHUNK
from tokensieve.files import write_json, write_text
from tokensieve.report import plots
from tokensieve.report.cost_figures import show_balances, show_costs, show_paper, write_costs, write_paper
from tokensieve.report.origin import environment
from tokensieve.report.paper_suite import show_comparison, show_paper_suite, write_paper_suite
from tokensieve.report.plan_table import NamedPlan, plan_figures, show_plan
from tokensieve.report.posttrain import show_posttraining, write_curves
from tokensieve.report.posttrain_page import write_posttraining
from tokensieve.report.profile_page import write_profile
from tokensieve.report.profile_table import show_profile
from tokensieve.report.runs_page import read_run, write_runs
from tokensieve.report.suites import serving_line, show_long, show_short, show_suite
from tokensieve.report.table import counted, crossover_text, show, show_criteria
from tokensieve.report.templates import render

__all__ = [
    "NamedPlan",
    "environment",
    "plan_figures",
    "read_run",
    "serving_line",
    "show",
    "show_comparison",
    "show_balances",
    "show_costs",
    "show_criteria",
    "show_long",
    "show_paper",
    "show_paper_suite",
    "show_plan",
    "show_posttraining",
    "show_profile",
    "show_short",
    "show_suite",
    "write_costs",
    "write_curves",
    "write_paper",
    "write_paper_suite",
    "write_posttraining",
    "write_profile",
    "write_report",
    "write_run",
    "write_runs",
]

RELATIONS = {"<=": "≤", ">=": "≥"}


def write_run(
    folder: str | Path,
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    details: Mapping[str, Any],
) -> Path:
    """Writes metrics.json, details.json (the history too) and report.html to a folder; returns the page's path.

    Arguments and errors as in `write_report`.
    """
    folder = Path(folder)
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "details.json", {**details, "history": history})
    return write_report(metrics, history, folder / "report.html", details)


def write_report(
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    path: str | Path,
    details: Mapping[str, Any],
) -> Path:
    """Writes the page to `path` and returns it.

    Args:
        metrics: a demo's metrics.json.
        history: rows {"stage", "step", "kl"?, "recall"?}, in order; steps count from 1 within a stage (0: before it).
        details: {"base": name, "parameters", "questions": counts, "texts": {"all", "shared": counts}, "run":
            `environment()`, "heat": {arm: {"lengths", "accuracy", "counts"}}, "loss_by_position": {"edges", "loss":
            {arm: nats}}, "cache_reads": {"dense", "sparse", "index_keys": {context: bytes}}, "recall": {"by_layer",
            "held", "best": one share per layer}}.

    Raises:
        UserError: the file cannot be written.
    """
    criteria = parity_criteria(metrics)
    loss, top_k = details["loss_by_position"], metrics["top_k"]
    drawn = {
        "kl": plots.kl_plot(history),
        "recall": plots.recall_plot(history, RECALL),
        "loss": plots.loss_plot(loss, top_k),
        "difference": plots.difference_plot(loss, top_k),
        "reads": plots.reads_plot(details["cache_reads"]),
        "token": plots.time_plot(metrics["decode_ms"], "a token"),
        "chunk": plots.time_plot(metrics["chunk_ms"], f"{CHUNK} tokens"),
    }
    text = render(
        "page.html.j2",
        metrics=metrics,
        details=details,
        run=details["run"],
        seconds=cost.duration(metrics["seconds"]),
        arms=[_arm(name, metrics[name]) for name in ARMS if name in metrics],
        criteria=[_row(c) for c in criteria],
        verdicts=_count(criteria),
        ratios=[(plots.label(arm), _figure(found)) for arm, found in metrics["compared"]["ppl"].items()],
        seen=_seen(metrics, details),
        chunk=CHUNK,
        share=lambda x: f"{100 * x:.1f}%",
        points=lambda x: f"{100 * x:+.1f}",
        figures={name: Markup(figure) for name, figure in drawn.items()},
        maps=[Markup(plots.heat_plot(heat, arm)) for arm, heat in details["heat"].items()],
    )
    return write_text(path, text)


def _arm(name: str, figures: Mapping[str, float]) -> dict[str, Any]:
    color = plots.VARIABLES[plots.STYLES[name]["color"]]
    return {"name": name, "label": plots.label(name), "what": ARMS[name], "color": color, **figures}


def _count(criteria: Sequence[Criterion]) -> str:
    """For instance "4 hold, 1 within noise"."""
    found = [c.verdict for c in criteria]
    words = {"holds": "hold", "within noise": "within noise", "fails": "fail"}
    return ", ".join(f"{found.count(verdict)} {word}" for verdict, word in words.items() if verdict in found)


def _figure(found: Mapping[str, Any]) -> str:
    """An `Estimate` of texts, in words."""
    texts = counted(found, "text", "document")
    if found["low"] is None:
        return f"{found['value']:.3f} ({texts})"
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f}, {texts})"


def _row(c: Criterion) -> dict[str, Any]:
    points = c.relation == ">=" and "recall" not in c.name

    def text(x: float) -> str:
        return f"{100 * x:+.1f}" if points else f"{x:.3f}"

    return {
        "name": c.name.replace("_", " "),
        "value": text(c.value) + (" points" if points else ""),
        "interval": "" if c.low is None or c.high is None else f"{text(c.low)} to {text(c.high)}",
        "n": "" if c.n is None else f"{c.n:,}",
        "clusters": "" if c.clusters is None else f"{c.clusters:,}",
        "bound": f"{RELATIONS[c.relation]} " + (f"{100 * c.bound:+.0f} points" if points else f"{c.bound:.2f}"),
        "verdict": c.verdict,
    }


def _seen(metrics: Mapping[str, Any], details: Mapping[str, Any]) -> dict[str, Any]:
    """The figures in the page's paragraphs beside those in the metrics."""
    by_layer = details["recall"]["by_layer"]
    worst = min(range(len(by_layer)), key=by_layer.__getitem__)
    ratio = metrics["compared"]["ppl"]["dense"]
    contexts = sorted(map(int, metrics["decode_ms"]["dense"]))
    return {
        "ratio": ratio,
        "ppl_change": 100 * (ratio["value"] - 1),
        "worst_layer": worst,
        "worst_recall": by_layer[worst],
        "worst_best": details["recall"]["best"][worst],
        "shortest": contexts[0],
        "longest": contexts[-1],
        "token": _timed(metrics["decode_ms"]),
        "chunk": _timed(metrics["chunk_ms"]),
    }


def _timed(ms: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What the longest context costs, and where sparse is ahead, as words."""
    longest = max(ms["dense"], key=int)
    faster = ms["dense"][longest] / ms["sparse"][longest]
    return {
        "ms": {name: f"{by_context[longest]:,.0f}" for name, by_context in ms.items()},
        "faster": f"{faster:.1f} times faster than dense"
        if faster > 1.05
        else "slower than dense"
        if faster < 0.95
        else "level with dense",
        "crossover": crossover_text(ms),
    }
