"""The suites' tables in a terminal."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.markup import escape

from tokensieve.report.table import table


def show_long(console: Console, figures: Mapping[str, Any]) -> None:
    """Prints scores by task, length and arm; by depth; and perplexity by position, if it was measured."""
    names = "task", "tokens", "arm", "score", "95% interval", "n", "contexts", "less the first arm's"
    scores = table(*names)
    for row in figures["tasks"]:
        begin = row["task"], f"{row['context']:,}", escape(row["arm"]), *_share(row["score"])
        scores.add_row(*begin, str(row["score"]["n"]), str(row["contexts"]), _difference(row["difference"]))
    console.print(scores)
    deep = [row for row in figures["tasks"] if any(row["counts"])]
    if deep:
        by_depth = table("score by depth", "tokens", "arm", *(f"{10 * tenth}%" for tenth in range(10)))
        for row in deep:
            shares = ("" if share is None else f"{100 * share:.0f}" for share in row["by_depth"])
            by_depth.add_row(row["task"], f"{row['context']:,}", escape(row["arm"]), *shares)
        console.print()
        console.print(by_depth)
    if "positions" in figures:
        _show_positions(console, **figures["positions"])


def _show_positions(console: Console, edges: Sequence[int], ppl: Mapping[str, Any], ratio: Mapping[str, Any]) -> None:
    positions = table("perplexity after tokens", *map(escape, ppl), *(f"{escape(name)}, ratio" for name in ratio))
    for place, (begin, end) in enumerate(pairwise(edges)):
        found = [by_arm[place] for by_arm in (*ppl.values(), *ratio.values())]
        positions.add_row(f"{begin:,} to {end:,}", *map(_interval, found))
    console.print()
    console.print(positions)
    console.print(f"[dim]{next(iter(ppl.values()))[0]['n']} texts, 95% intervals over them[/dim]", highlight=False)


def show_short(console: Console, figures: Mapping[str, Any]) -> None:
    """Prints scores by task and arm, and the perplexity of short texts."""
    scores = table("task", "arm", "score", "95% interval", "n", "less the first arm's")
    for row in figures["tasks"]:
        count = str(row["score"]["n"])
        scores.add_row(row["task"], row["arm"], *_share(row["score"]), count, _difference(row["difference"]))
    console.print(scores)
    console.print("[dim]Four choices each: chance is 25%[/dim]", highlight=False)
    texts = table(f"texts of {figures['sizes']['tokens']} tokens", "perplexity", "n", "over the first arm's")
    for row in figures["texts"]:
        texts.add_row(row["arm"], _interval(row["ppl"]), str(row["ppl"]["n"]), _interval(row["ratio"]))
    console.print()
    console.print(texts)


def _share(found: Mapping[str, Any]) -> tuple[str, str]:
    interval = "" if found["low"] is None else f"{100 * found['low']:.0f} to {100 * found['high']:.0f}%"
    return f"{100 * found['value']:.1f}%", interval


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    interval = "" if found["low"] is None else f" ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"
    return f"{100 * found['value']:+.1f}{interval}"


def _interval(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    interval = "" if found["low"] is None else f" ({found['low']:.3f} to {found['high']:.3f})"
    return f"{found['value']:.3f}{interval}"
