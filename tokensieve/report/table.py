"""The same figures in a terminal."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokensieve.evals.criteria import Criterion, parity_criteria
from tokensieve.evals.parity import ARMS
from tokensieve.evals.timing import CHUNK, crossover


def show(console: Console, metrics: Mapping[str, Any]) -> None:
    """Prints the arms, the times of a token and of a chunk if they were measured, and which criteria hold."""
    arms = table("arm", "perplexity", "needles", "95% interval", "")
    more = {name: f"as sparse, but {selection} selects" for name, selection in metrics.get("selections", {}).items()}
    for name, what in (ARMS | more).items():
        if name in metrics:
            figures = metrics[name]
            style = "bold" if name == "sparse" else None
            accuracy = "", ""
            if "needle" in figures:
                low, high = figures["needle_interval"]
                interval = "" if low is None else f"{100 * low:.0f} to {100 * high:.0f}%"
                accuracy = f"{100 * figures['needle']:.1f}%", interval
            arms.add_row(escape(name), f"{figures['ppl']:.3f}", *accuracy, f"[dim]{escape(what)}[/dim]", style=style)
    console.print(arms)
    for key, what in (("decode_ms", "a token"), ("chunk_ms", f"{CHUNK} tokens")):
        if key not in metrics:
            continue
        contexts = next(iter(metrics[key].values()))
        times = table(f"ms for {what} at a context of", *(f"{int(c):,}" for c in contexts))
        for name, by_context in metrics[key].items():
            times.add_row(name, *(f"{ms:,.1f}" for ms in by_context.values()))
        console.print()
        console.print(times)
        console.print(f"[dim]{crossover_text(metrics[key])}[/dim]", highlight=False)
    console.print()
    show_criteria(console, parity_criteria(metrics))
    for arm in ("dense", "dense_adapted"):
        if arm in metrics["compared"]["ppl"]:
            found = metrics["compared"]["ppl"][arm]
            figure = _estimate(found, "text", "document")
            console.print(f"       sparse perplexity / {arm}: {figure}", highlight=False)


def crossover_text(ms: Mapping[str, Mapping[str, float]]) -> str:
    """Where sparse is ahead: "Sparse takes no longer than dense from 8,192 tokens on"."""
    found = crossover(ms)
    if found is None:
        return f"Sparse takes longer than dense up to {max(map(int, ms['dense'])):,} tokens, the most that was measured"
    return f"Sparse takes no longer than dense from {found:,} tokens on"


def show_criteria(console: Console, criteria: Iterable[Criterion]) -> None:
    """A line for each: whether it holds, its figure, its interval and prompts if it has them, and its bound."""
    colors = {"holds": "green", "fails": "red", "within noise": "yellow"}
    for c in criteria:
        verdict = f"[{colors[c.verdict]}]{c.verdict}[/{colors[c.verdict]}]"
        units = ("text", "document") if "perplexity" in c.name else ("prompt", "context")
        figure = f"{c.value:.3f}" if c.n is None else _estimate(vars(c), *units)
        console.print(f"{verdict}  {c.name}: {figure}, needed {c.relation} {c.bound:.2f}", highlight=False)


def _estimate(found: Mapping[str, Any], unit: str, cluster: str) -> str:
    interval = "" if found["low"] is None else f"{found['low']:.3f} to {found['high']:.3f}, "
    return f"{found['value']:.3f} ({interval}{counted(found, unit, cluster)})"


def counted(found: Mapping[str, Any], unit: str, cluster: str) -> str:
    """What an estimate stands on: "64 prompts of 4 contexts", or "16 texts" if each is of its own."""
    n, clusters = found["n"], found.get("clusters")
    text = f"{n} {unit}{'' if n == 1 else 's'}"
    if clusters in (None, n):
        return text
    return f"{text} of {clusters} {cluster}{'' if clusters == 1 else 's'}"


def table(*columns: str) -> Table:
    """A table without lines, whose first column and whose column without a name hold text, the others figures."""
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for place, column in enumerate(columns):
        figure = column and place
        made.add_column(column, justify="right" if figure else "left", no_wrap=bool(figure) or place == 0)
    return made
