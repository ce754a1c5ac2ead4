"""The bar of a run: its steps, the last figures, and the time that is left."""

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tokensieve import cost


@contextlib.contextmanager
def progress_bar(show: bool, name: str, first: int, last: int) -> Iterator[Callable[[dict[str, float], float], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[left]}"), disable=not show) as bar:
        task = bar.add_task(name, total=last, completed=first, figures="", left="")

        def advance(figures: dict[str, float], seconds: float) -> None:
            text = "  ".join(f"{k} {figures[k]:.3f}" for k in ("lm", "kl") if k in figures)
            bar.update(task, advance=1, figures=text, left=f"left {cost.duration(seconds)}" if seconds else "")

        yield advance
