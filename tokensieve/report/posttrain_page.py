"""The page of a post-training run: accuracy, and curves of reward and output tokens, of one run or of it and its twin.

Source of the layout: DeepSeek-V3.2-Exp report, Figure 2.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup

from tokensieve.files import write_text
from tokensieve.report.plots import RC, STYLES, figure, svg
from tokensieve.report.posttrain import CURVES, Rows, accuracy_cells, draw_steps
from tokensieve.report.templates import render

ARMS = {"indexer": "sparse", "dense": "dense"}  # by the run's selection


def write_posttraining(
    folder: Path, runs: Mapping[str, Mapping[str, Any]], histories: Mapping[str, Mapping[str, Rows]]
) -> Path:
    """Writes posttrain.html to a folder; returns its path.

    runs: metrics.json by arm, "sparse" or "dense"; the first is the folder's own. histories: the same arms' rows of TRL
    by stage. UserError if the page cannot be written.
    """
    stages = list(dict.fromkeys(stage for by_stage in histories.values() for stage in by_stage))
    drawn = {
        stage: {
            name: Markup(_plot({arm: by[stage] for arm, by in histories.items() if stage in by}, column, name, stage))
            for column, name in CURVES.items()
        }
        for stage in stages
    }
    evaluations = {arm: metrics.get("evaluation", {}) for arm, metrics in runs.items()}
    groups = dict.fromkeys(group for models in evaluations.values() for found in models.values() for group in found)
    models = dict.fromkeys(model for found in evaluations.values() for model in found)
    rows = [
        (group, model, arm, *accuracy_cells(found[model][group]))
        for group in groups
        for model in models
        for arm, found in evaluations.items()
        if group in found.get(model, {})
    ]
    judges = list(dict.fromkeys(metrics["judge"] for metrics in runs.values()))
    return write_text(
        folder / "posttrain.html", render("posttrain.html.j2", runs=runs, judges=judges, rows=rows, stages=drawn)
    )


def _plot(by_arm: Mapping[str, Rows], column: str, name: str, stage: str) -> str:
    with mpl.rc_context(RC):
        drawn, axes = figure(f"{stage}-{name}".replace(" ", "-"))
        draw_steps(axes, by_arm, column, name, STYLES)
        if len(by_arm) > 1:
            drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return svg(drawn, f"{name} of {stage} against training step")
