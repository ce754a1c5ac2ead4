"""Table 1 of the paper with a column for a measured model, and two models side by side."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from tokensieve.evals.paper import AFTER, BEFORE, BENCHMARKS, BY_KEY, LACKING, Benchmark
from tokensieve.files import write_text
from tokensieve.report.table import table

NONE = "-"


def show_paper_suite(console: Console, name: str, figures: Mapping[str, Any]) -> None:
    """Prints the table, why rows of it are empty, and how the others differ from the paper's way."""
    shown = table(*_header(escape(name)))
    for row in _rows(figures):
        shown.add_row(*row)
    console.print(shown)
    for line in _remarks(figures):
        console.print(f"[dim]{escape(line)}[/dim]", highlight=False)


def write_paper_suite(path: Path, name: str, figures: Mapping[str, Any]) -> Path:
    """Writes the same as Markdown and returns the path.

    Raises:
        UserError: the file cannot be written.
    """
    rows = [_header(name), ["---"] * len(_header(name)), *_rows(figures)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return write_text(path, "\n".join([*lines, "", *(f"- {line}" for line in _remarks(figures)), ""]))


def table_1(name: str, figures: Mapping[str, Any]) -> tuple[list[str], list[list[str]], list[str]]:
    """Names of the columns, rows, and remarks."""
    return _header(name), _rows(figures), _remarks(figures)


def show_comparison(
    console: Console, names: tuple[str, str], rows: Sequence[Mapping[str, Any]], left_out: Sequence[str]
) -> None:
    """Prints the scores of two models, and the difference of their shares of right answers, the second less the
    first; and which benchmarks are left out, and why.
    """
    first, second = map(escape, names)
    shown = table("Benchmark (Metric)", first, second, "difference", "95% interval", "problems", "tokens of both")
    for row in rows:
        benchmark, difference = BY_KEY[row["key"]], row["difference"]
        scores = (_value(benchmark, row[side]["value"]) for side in ("a", "b"))
        change = f"{100 * difference['value']:+.1f}"
        counts = " / ".join(map(_tokens, row["tokens"]))
        shown.add_row(benchmark.name, *scores, change, _ends(difference, 100, "+"), str(difference["n"]), counts)
    console.print(shown)
    console.print(
        "[dim]Differences in points of right answers, on the problems that both answered; intervals for pairs[/dim]",
        highlight=False,
    )
    for line in left_out:
        console.print(f"[dim]left out: {escape(line)}[/dim]", highlight=False)


def _header(name: str) -> list[str]:
    return ["Group", "Benchmark (Metric)", name, "95% interval", "problems", "output tokens", BEFORE, AFTER]


def _rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """A row for each benchmark, in the paper's order; the group is named in its first."""
    rows = []
    asked = [benchmark for benchmark in BENCHMARKS if benchmark.key in figures or benchmark.key in figures[LACKING]]
    for group, members in groupby(asked, lambda benchmark: benchmark.group):
        for place, benchmark in enumerate(members):
            columns = [_value(benchmark, _fraction(benchmark, x)) for x in (benchmark.before, benchmark.after)]
            begin = ["" if place else group, benchmark.name]
            rows.append([*begin, *_measured(benchmark, figures.get(benchmark.key)), *columns])
    return rows


def _measured(benchmark: Benchmark, found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return [NONE] * 4
    score = found["score"]
    ends = _ends(score, 1 if benchmark.is_rating else 100)
    return [_value(benchmark, score["value"]), ends, str(found["problems"]), _tokens(found["tokens"])]


def _remarks(figures: Mapping[str, Any]) -> list[str]:
    lines = []
    for benchmark in BENCHMARKS:
        if reason := figures[LACKING].get(benchmark.key):
            lines.append(f"{benchmark.name}: not measured: {reason}")
            continue
        if found := figures.get(benchmark.key):
            parts = [benchmark.note] if benchmark.note else []
            if found["ungraded"]:
                parts.append(f"{found['ungraded']} answers that failed or were not graded are left out")
            lines += [f"{benchmark.name}: {'; '.join(parts)}"] if parts else []
    return lines


def _fraction(benchmark: Benchmark, figure: float) -> float:
    return figure if benchmark.is_rating else figure / 100


def _value(benchmark: Benchmark, value: float | None) -> str:
    """In percent, or as a rating; the interval says on which side one lies that has no value."""
    if value is None:
        return "unbounded"
    return f"{value:.0f}" if benchmark.is_rating else f"{100 * value:.1f}"


def _ends(estimate: Mapping[str, Any], times: float, sign: str = "") -> str:
    """An interval, of which an end may be missing."""
    low, high = estimate["low"], estimate["high"]
    form = f"{sign}.0f" if times == 1 else f"{sign}.1f"
    if low is None and high is None:
        return NONE
    if low is None:
        return f"below {times * high:{form}}"
    return f"above {times * low:{form}}" if high is None else f"{times * low:{form}} to {times * high:{form}}"


def _tokens(estimate: Mapping[str, Any] | None) -> str:
    return NONE if estimate is None else f"{estimate['value']:,.0f}"
