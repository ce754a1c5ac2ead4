"""The command that puts the figures of many runs on one page."""

from pathlib import Path
from typing import Annotated

import typer

from tokensieve.cli.program import OneProcess, app


@app.command(cls=OneProcess)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option(help="Folder of report.html and plots/.")] = Path("runs/report"),
) -> None:
    """Put the figures of runs on one page: HTML with plots, each beside it as SVG and its data as CSV.

    A run is the folder of an evaluation with any suite, a check of serving, a demo, a profile, costs or post-training.
    Runs of one kind are set side by side, with paired differences if they read the same prompts.

    Example: tokensieve report runs/eval-sparse-parity runs/eval-sparse-long
    """
    from tokensieve.config import UserError

    for folder in runs:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; name the folders of finished runs, such as runs/eval-sparse")
    from tokensieve.report import read_run, write_runs

    typer.echo(write_runs(out, [read_run(folder) for folder in runs]))
