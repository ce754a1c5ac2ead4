"""The plot of benchmarks/posttraining.py: what two terms of the reward trade for accuracy."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokensieve.files import write_text
from tokensieve.report.plots import BLUE, INK, RC, svg
from tokensieve.report.profile_plots import standalone

Rows = Sequence[Mapping[str, Any]]
PANELS = {  # by term: the column that its weight trades, and what the axis calls it
    "length": ("output tokens", "output tokens, mean"),
    "language": ("language share", "letters in the prompt's language, %"),
}


def write_trade_offs(folder: Path, rows: Rows) -> None:
    """Writes trade-offs.svg: a panel for each of the two terms, of which at least two weights have figures.

    rows: those of the table of weights, as figures.json has them. Without a panel nothing is written. UserError if the
    file cannot be written.
    """
    points = {term: [row for row in rows if row["term"] == term and row[PANELS[term][0]] != ""] for term in PANELS}
    shown = {term: found for term, found in points.items() if len(found) > 1}
    if not shown:
        return
    with mpl.rc_context(RC):
        drawn = Figure(figsize=(4.5 * len(shown), 3.6), layout="constrained")
        drawn.patch.set_alpha(0.0)
        drawn.set_gid("trade-offs")
        panels = drawn.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, (term, found) in zip(panels, shown.items(), strict=True):
            _panel(axes, term, found)
        panels[0].set_ylabel("accuracy, %")
        text = svg(drawn, "Accuracy against output tokens and language of answers, for each weight in the reward")
    write_text(folder / "trade-offs.svg", standalone(text))


def _panel(axes: Axes, term: str, rows: Rows) -> None:
    """Accuracy with its interval against what is traded, in the order of the weights, which stand above the points."""
    column, name = PANELS[term]
    axes.patch.set_alpha(0.0)
    axes.plot([row[column] for row in rows], [row["accuracy"]["value"] for row in rows], color=BLUE, marker="o",
              markersize=4.5, linewidth=1.2)  # fmt: skip
    labels: dict[float, list[tuple[float, str]]] = {}  # weights that trade nothing stand above each other
    for row in rows:
        x, value, low, high = row[column], *(row["accuracy"][key] for key in ("value", "low", "high"))
        if low is not None:  # one group bounds nothing
            axes.vlines(x, low, high, color=BLUE, linewidth=1.4, alpha=0.5)
        labels.setdefault(round(x, 1), []).append((value if high is None else high, f"{row['weight']:g}"))
    for x, alike in labels.items():
        place, text = (x, max(top for top, _ in alike)), ", ".join(weight for _, weight in alike)
        axes.annotate(text, place, xytext=(0, 4), textcoords="offset points", ha="center", color=INK)
    axes.set_title(f"weight of {term}", fontsize=10, loc="left")
    axes.set_xlabel(name)
    axes.margins(0.12)
    if column == "language share":
        axes.set_xlim(right=min(axes.get_xlim()[1], 101))  # a share has an end
    axes.grid(True, axis="y")
    axes.tick_params(length=0)
