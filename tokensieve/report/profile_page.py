"""The page of `tokensieve profile`, in the report's style, and its main figure as a file of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tokensieve.files import write_json, write_text
from tokensieve.report import profile_plots, profile_table
from tokensieve.report.templates import render


def write_profile(folder: str | Path, metrics: Mapping[str, Any], mass: float, sharing: float) -> Path:
    """Writes metrics.json, profile.html and, if attention was measured, mass.svg; returns the page's path.

    metrics: what `tokensieve.profile.profile` returns, with "model", "data", "seconds" and "run". mass, sharing: the
    thresholds that the figures show.

    Raises:
        UserError: a file cannot be written.
    """
    folder = Path(folder)
    write_json(folder / "metrics.json", metrics)
    attention, advice = metrics["attention"], metrics["advice"]
    marks = {f"k = {advice['top_k']:,}": advice["top_k"]} if advice["top_k"] else {}
    if advice["dense_below"]:
        marks[f"sparse is cheaper from {advice['dense_below']:,} on"] = advice["dense_below"]
    drawn = {"lengths": profile_plots.lengths_plot(metrics["lengths"], marks)}
    if attention["texts"]:
        known = [int(k) for k in attention["mass_by_layer"]]
        drawn |= {
            "mass": profile_plots.mass_plot(attention, mass),
            "positions": profile_plots.positions_plot(attention),
            "layers": profile_plots.layers_plot(attention, advice["top_k"] or known[-1], sharing),
        }
        write_text(folder / "mass.svg", profile_plots.standalone(drawn["mass"]))
    text = render(
        "profile.html.j2",
        metrics=metrics,
        lengths=metrics["lengths"],
        attention=attention,
        advice=advice,
        text=profile_table,
        shown_k=advice["top_k"] or max(map(int, attention["mass_by_layer"]), default=0),
        figures={name: Markup(figure) for name, figure in drawn.items()},
    )
    return write_text(folder / "profile.html", text)
