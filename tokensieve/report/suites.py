"""The suites' tables in a terminal."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.markup import escape

from tokensieve.report.sections import text_of
from tokensieve.report.table import counted, table


def show_suite(console: Console, suite: str, figures: Mapping[str, Any]) -> None:
    """Prints the figures of a suite: "long", "short" or "parity"."""
    {"long": show_long, "short": show_short, "parity": show_parity}[suite](console, figures)


def show_parity(console: Console, figures: Mapping[str, Any]) -> None:
    """Prints texts, recall by layer and tasks of every arm, and for each k whether it is parity."""
    written = figures["sizes"]["written"]
    texts = table(f"{figures['context']:,} tokens", "perplexity over dense's", "same tokens", "95% interval",
                  f"first of {written} that differs")  # fmt: skip
    for row in figures["texts"]:
        texts.add_row(row["arm"], text_of(row["ratio"]), *_share(row["same"]), _plus_minus(row["first"], 1))
    console.print(texts)
    texts_read = counted(figures["texts"][0]["ppl"], "text", "document")
    console.print(f"[dim]{texts_read}; same tokens: of dense's greedy continuation, read with each arm[/dim]")
    layers = range(len(figures["recall"][0]["by_layer"]))
    recalls = table("recall of the mass by layer", "all", "95% interval", *map(str, layers))
    for row in figures["recall"]:
        recalls.add_row(row["arm"], *_share(row["overall"]), *(f"{100 * e['value']:.0f}" for e in row["by_layer"]))
    console.print()
    console.print(recalls)
    if figures["tasks"]:
        console.print()
        _show_scores(console, figures["tasks"])
    console.print()
    for found in figures["verdicts"]:
        color = {"parity": "green", "no parity": "red", "undecided": "yellow"}[found["verdict"]]
        line = f"k = {found['k']:,}: [{color}]{found['verdict']}[/{color}], {found['reason']}"
        console.print(line, highlight=False)
    left_out = dict.fromkeys(why for found in figures["verdicts"] for why in found["left_out"])
    for why in left_out:
        console.print(f"[dim]not judged: {why}[/dim]", highlight=False)


def show_long(console: Console, figures: Mapping[str, Any]) -> None:
    """Prints scores by task, length and arm; by depth; and perplexity by position, if it was measured."""
    _show_scores(console, figures["tasks"])
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


def _show_scores(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    names = "task", "tokens", "arm", "score", "95% interval", "n", "contexts", "less the first arm's"
    scores = table(*names)
    for row in rows:
        begin = row["task"], f"{row['context']:,}", escape(row["arm"]), *_share(row["score"])
        scores.add_row(*begin, str(row["score"]["n"]), str(row["contexts"]), _difference(row["difference"]))
    console.print(scores)


def _show_positions(console: Console, edges: Sequence[int], ppl: Mapping[str, Any], ratio: Mapping[str, Any]) -> None:
    """The first arm's perplexity, and the others' over it: with ten arms there is no room for more."""
    first, stretches = next(iter(ppl.items()))
    positions = table("perplexity after tokens", escape(first), *map(escape, ratio))
    for place, (begin, end) in enumerate(pairwise(edges)):
        found = [by_arm[place] for by_arm in (stretches, *ratio.values())]
        positions.add_row(f"{begin:,} to {end:,}", *map(_plus_minus, found))
    console.print()
    console.print(positions)
    over = f"; the other arms' over that of {escape(first)}" if ratio else ""
    texts = counted(stretches[0], "text", "document")
    of = "documents" if stretches[0].get("clusters") else "texts"
    console.print(f"[dim]{texts}, ± half of the 95% interval over {of}{over}[/dim]", highlight=False)


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
        read = counted(row["ppl"], "text", "document")
        texts.add_row(row["arm"], text_of(row["ppl"]), read, text_of(row["ratio"]))
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


def _plus_minus(found: Mapping[str, Any], digits: int = 3) -> str:
    half = "" if found["low"] is None else f" ± {(found['high'] - found['low']) / 2:.{digits}f}"
    return f"{found['value']:.{digits}f}{half}"


def serving_line(probe: Mapping[str, Any]) -> str:
    """A probe of `evals.serving` in one line."""
    state = {True: "WRONG", False: "ok", None: "-"}[probe["found"]]
    return f"{state:6}{probe['name']:18}{probe['tokens']:>8,} tokens  {probe['line']}"
