"""`tokensieve report`: one page of many runs, and beside it each chart as SVG and CSV."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tokensieve.config import UserError
from tokensieve.evals.paper import LACKING
from tokensieve.files import write_text
from tokensieve.report import sections
from tokensieve.report.profile_plots import standalone
from tokensieve.report.sections import Section
from tokensieve.report.side_by_side import side_by_side
from tokensieve.report.templates import render

FILES = ("metrics.json", "serving.json", "cost.json")  # of a run; the first that is there counts
HISTORY = "history.json"  # TRL's rows, in the folder of each stage of post-training
PLOTS = "plots"  # folder of the charts, beside the page
TOGETHER = "side-by-side/"  # in it


def _posttraining(figures: Any, folder: Path) -> list[Section]:
    files = sorted(folder.glob(f"**/{HISTORY}"))
    return sections.posttraining(figures, {_stage(file, folder): json.loads(file.read_text("utf-8")) for file in files})


def _stage(file: Path, folder: Path) -> str:
    """specialists/logic/rl/history.json is of the stage "specialists logic rl"."""
    return " ".join(file.relative_to(folder).parts[:-1]) or "training"


Reader = Callable[[Any], list[Section]]

# A key of the file, and who reads it. Of several that are there the first reads.
READERS: tuple[tuple[str, Reader], ...] = (
    ("probes", sections.serving),
    (LACKING, sections.paper),
    ("prefill_dense", sections.paper_costs),
    ("rows", sections.costs),
    ("advice", sections.profile),
    ("compared", sections.arms),
    ("needles", sections.acceptance),
    *((suite, lambda figures, suite=suite, read=read: read(figures[suite])) for suite, read in sections.SUITES.items()),
)


@dataclass(frozen=True)
class Run:
    """name: its folder as it was given. origin: what `environment` said in the run, if it is known."""

    name: str
    sections: Sequence[Section]
    origin: Mapping[str, str]

    @property
    def stem(self) -> str:
        """How the names of its files begin."""
        return re.sub(r"[^\w.=-]+", "-", self.name).strip("-.") or "run"


def read_run(folder: Path) -> Run:
    """The figures of a run folder: an evaluation with any suite, a demo, a profile, costs, post-training, a check of
    serving.

    Raises:
        UserError: no file that is known, or one that cannot be read or does not hold the figures of a finished run.
    """
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds none of {', '.join(FILES)}; name the folder of a finished run")
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); repeat the run") from error
    known = figures if isinstance(figures, dict) else {}
    readers: list[tuple[str, Reader]] = [("evaluation", partial(_posttraining, folder=folder)), *READERS]
    read = next((read for key, read in readers if key in known), None)
    if read is None:
        raise UserError(f"{path} holds no figures that report knows; name a finished evaluation, demo, profile or cost")
    try:
        return Run(str(folder), read(figures), figures.get("run", {}))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} lacks what a finished run has ({error!r}); finish or repeat the run") from error


def write_runs(folder: Path, runs: Sequence[Run]) -> Path:
    """Writes report.html to a folder, and plots/RUN-CHART.svg and .csv; returns the page's path. Runs of one kind come
    first, side by side, with their charts in plots/side-by-side/.

    Raises:
        UserError: a file cannot be written, or two runs would have the same files.
    """
    stems = [run.stem for run in runs]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise UserError(f"two runs are called {twice[0]}; name each once, in a folder of its own")
    together = side_by_side({run.name: run.sections for run in runs})
    parts_of_page = [(f"{run.stem}-", run) for run in runs]
    if together:  # a folder of its own, since a run may have any name
        parts_of_page.insert(0, (TOGETHER, Run("Side by side", together, {})))
    shown = []
    for prefix, run in parts_of_page:
        parts = []
        for section in run.sections:
            charts = []
            for chart in section.charts:
                file, drawn = f"{PLOTS}/{prefix}{chart.name}", chart.svg()
                write_text(folder / f"{file}.svg", standalone(drawn))
                write_text(folder / f"{file}.csv", chart.csv())
                caption = f"{chart.caption} {chart.left_out}".strip()
                charts.append({"title": chart.title, "caption": caption, "svg": Markup(drawn), "file": file})
            parts.append((section, charts))
        shown.append((run, parts))
    return write_text(folder / "report.html", render("runs.html.j2", runs=shown, names=[run.name for run in runs]))
