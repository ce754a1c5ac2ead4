"""The same figures in a terminal."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokensieve.evals.criteria import Criterion, parity_criteria
from tokensieve.evals.parity import ARMS


def show(console: Console, metrics: Mapping[str, Any]) -> None:
    """Prints the arms, the time of one more token if it was measured, and which criteria hold."""
    arms = _table("arm", "perplexity", "needles", "")
    more = {name: f"as sparse, but {selection} selects" for name, selection in metrics.get("selections", {}).items()}
    for name, what in (ARMS | more).items():
        if name in metrics:
            figures = metrics[name]
            style = "bold" if name == "sparse" else None
            accuracy = f"{100 * figures['needle']:.1f}%"
            arms.add_row(escape(name), f"{figures['ppl']:.3f}", accuracy, f"[dim]{escape(what)}[/dim]", style=style)
    console.print(arms)
    if "decode_ms" in metrics:
        contexts = next(iter(metrics["decode_ms"].values()))
        times = _table("ms per token after", *(f"{int(c):,}" for c in contexts))
        for name, by_context in metrics["decode_ms"].items():
            times.add_row(name, *(f"{ms:.1f}" for ms in by_context.values()))
        console.print()
        console.print(times)
    console.print()
    show_criteria(console, parity_criteria(metrics))


def show_criteria(console: Console, criteria: Iterable[Criterion]) -> None:
    """A line for each: whether it holds, its figure, and its bound."""
    for c in criteria:
        verdict = "[green]holds[/green]" if c.holds else "[red]fails[/red]"
        console.print(f"{verdict}  {c.name}: {c.value:.3f} ({c.relation} {c.bound:.2f})", highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for place, column in enumerate(columns):
        figure = column and place
        table.add_column(column, justify="right" if figure else "left", no_wrap=bool(figure) or place == 0)
    return table
