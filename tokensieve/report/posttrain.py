"""Post-training: the figures of its models in a terminal, and its curves as files."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from tokensieve.files import write_text
from tokensieve.report.plots import AMBER, BLUE, GREEN, INK, RC, RED, VIOLET, figure, svg
from tokensieve.report.profile_plots import standalone
from tokensieve.report.table import table

COLORS = (BLUE, GREEN, AMBER, RED, VIOLET)
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.2)))  # one for each round of the colors
CURVES = {"reward": "reward", "completions/mean_length": "output tokens"}  # a column of TRL's rows, and its name
MIXED = "all domains"  # the curve of the mixed stage

Rows = Sequence[Mapping[str, float]]


def write_curves(folder: Path, histories: Mapping[str, Rows]) -> None:
    """Writes reward.svg and output-tokens.svg: the mean of each step's answers against the step, a curve a stage.

    histories: TRL's rows of each stage of reinforcement learning that is done, by domain, or `MIXED`. Without any
    nothing is written. UserError if a file cannot be written.
    """
    if not histories:
        return
    for column, name in CURVES.items():
        write_text(folder / f"{name.replace(' ', '-')}.svg", standalone(_curve(histories, column, name)))


def _curve(histories: Mapping[str, Rows], column: str, name: str) -> str:
    styles: dict[str, dict[str, Any]] = {
        stage: {"color": COLORS[place % len(COLORS)], "linestyle": DASHES[place // len(COLORS) % len(DASHES)]}
        for place, stage in enumerate(histories)
    }
    styles[MIXED] = {"color": INK, "linestyle": "-"}
    with mpl.rc_context(RC):
        drawn, axes = figure(name.replace(" ", "-"), height=3.8)
        draw_steps(axes, histories, column, f"{name}, mean of the step's answers", styles)
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return svg(drawn, f"{name} against training step, for every stage of reinforcement learning")


def draw_steps(
    axes: Axes, histories: Mapping[str, Rows], column: str, name: str, styles: Mapping[str, dict[str, Any]]
) -> None:
    """A column of each history against the step, as a curve in its style; `name` is the vertical axis's."""
    for label, rows in histories.items():
        points = [(row["step"], float(row[column])) for row in rows if column in row]
        marker = "o" if len(points) < 10 else None
        axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4, **styles[label])
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(name)
    axes.grid(True, axis="y")
    axes.tick_params(length=0)


def show_posttraining(console: Console, figures: Mapping[str, Any]) -> None:
    """Prints the difficulties, what was distilled, and every model's accuracy on held-out problems."""
    _show_difficulties(console, figures)
    if "data" in figures.get("distilled", {}):
        data = table("distilled from", "sampled", "passed", "kept", "demonstrations")
        for group, counts in figures["distilled"]["data"].items():
            data.add_row(group, *(f"{counts[name]:,}" for name in ("sampled", "passed", "kept", "demonstrations")))
        console.print(data)
        console.print()
    models = figures.get("evaluation", {})
    groups = dict.fromkeys(group for found in models.values() for group in found)
    shown = table(
        "held-out problems", "model", "accuracy", "95% interval", "n", "output tokens", "language share",
        "queries past k", "gain",
    )  # fmt: skip
    for group in groups:
        for model, found in models.items():
            if group in found:
                shown.add_row(group, model, *accuracy_cells(found[group]))
    console.print(shown)


def _show_difficulties(console: Console, figures: Mapping[str, Any]) -> None:
    parts: Iterable[Mapping[str, Any]] = (part for part in figures.values() if isinstance(part, dict))
    knobs = {group: knob for part in parts for group, knob in part.get("difficulty", {}).items()}
    if not knobs:
        return
    shown = table("trained at difficulty", "", "pass rates", "")
    for group, knob in knobs.items():
        rates = ", ".join(f"{level}: {100 * rate:.0f}%" for level, rate in knob["rates"].items())
        verdict = {True: "", False: "[yellow]none is within the wanted rates[/yellow]", None: "fixed"}[knob["within"]]
        shown.add_row(group, str(knob["difficulty"]), rates, verdict)
    console.print(shown)
    console.print()


def accuracy_cells(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Accuracy, its interval, the number of problems, output tokens, the shares of letters in the prompt's language and
    of queries past k, and the gain. Runs of earlier versions have no language.
    """
    accuracy, language, past, gain = found["accuracy"], found.get("language"), found["past_k"], found.get("gain")
    return (
        f"{100 * accuracy['value']:.1f}%",
        f"{100 * accuracy['low']:.0f} to {100 * accuracy['high']:.0f}%",
        str(accuracy["n"]),
        f"{found['tokens']:.1f}",
        "" if language is None else f"{100 * language['value']:.0f}%",
        "" if past is None else f"{100 * past:.0f}%",
        "" if gain is None else _points(gain),
    )


def _points(gain: Mapping[str, Any]) -> str:
    """In percentage points, with the interval if there is one."""
    value = f"{100 * gain['value']:+.0f}"
    return value if gain["low"] is None else f"{value} ({100 * gain['low']:+.0f} to {100 * gain['high']:+.0f})"
