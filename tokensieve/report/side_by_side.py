"""Runs of one kind side by side: their figures in one table, paired if the prompts are the same, and their curves in
one plot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tokensieve.evals.paired import compared
from tokensieve.report.charts import Chart, Estimates
from tokensieve.report.sections import Section, Table, text_of

LEAD = (
    "Every figure that at least two of the runs have. To the first: the difference of shares, and the ratio of "
    "perplexities, to those of the first run, paired prompt by prompt. It is empty if the two read different prompts, "
    "or if a run did not keep what its figure was made of."
)

Place = tuple[str, str, float | str]  # chart, series, place


def side_by_side(runs: Mapping[str, Sequence[Section]]) -> list[Section]:
    """{name of a run: its sections} -> a section for each kind that several runs have figures of.

    If some of them have no charts, such as checks of serving, the rows of all tables stand beside each other too.
    """
    kinds = dict.fromkeys(section.kind for sections in runs.values() for section in sections)
    found = []
    for kind in kinds:
        having = {name: part for name, parts in runs.items() for part in parts if part.kind == kind}
        charts = {name: part.charts for name, part in having.items() if part.charts}
        title = " | ".join(dict.fromkeys(part.title for part in having.values()))
        rows = _rows(charts) if len(charts) > 1 else []
        head = ("figure", *charts, *(f"{name}, to the first" for name in [*charts][1:]))
        tables = [Table(head, rows)] if rows else []
        tables += _stacked(having) if len(charts) < len(having) > 1 else []
        if tables:
            found.append(Section(kind, title, [LEAD] if rows else (), tables, _merged(kind, charts) if rows else ()))
    return found


def _stacked(sections: Mapping[str, Section]) -> list[Table]:
    """Tables with the same columns as one: rows that begin with the same two cells stand together, one for each run."""
    stacked = []
    for head in dict.fromkeys(tuple(table.head) for part in sections.values() for table in part.tables):
        rows = [
            (name, *row)
            for name, part in sections.items()
            for table in part.tables
            if tuple(table.head) == head
            for row in table.rows
        ]
        places = [*dict.fromkeys(tuple(row[1:3]) for row in rows)]
        stacked.append(Table(("run", *head), sorted(rows, key=lambda row: places.index(tuple(row[1:3])))))
    return stacked


def _points(charts: Sequence[Chart]) -> dict[Place, Estimates]:
    return {
        (chart.title, series, place): estimate
        for chart in charts
        for series, points in chart.series.items()
        for place, estimate in points
    }


def _rows(charts: Mapping[str, Sequence[Chart]]) -> list[tuple[str, ...]]:
    by_run = [_points(of_run) for of_run in charts.values()]
    rows = []
    for place in dict.fromkeys(place for points in by_run for place in points):
        of_runs = [points.get(place) for points in by_run]
        if sum(e is not None for e in of_runs) > 1:
            differences = [_difference(of_runs[0], e) for e in of_runs[1:]]
            rows.append((_name(place), *map(text_of, of_runs), *differences))
    return rows


def _name(place: Place) -> str:
    title, series, at = place
    where = f"{at:,.0f}" if isinstance(at, float | int) else at
    return ", ".join(part for part in (title, series, where) if part)


def _difference(first: Estimates | None, other: Estimates | None) -> str:
    """The paired difference or ratio in words; empty if the two cannot be paired."""
    found = None if first is None or other is None else compared(first, other)
    if found is None:
        return ""
    how, estimate = found
    return f"{how} {text_of(vars(estimate))}, n = {estimate.n}"


def _merged(kind: str, charts: Mapping[str, Sequence[Chart]]) -> list[Chart]:
    """Charts of the same name as one, a series for each series of each run."""
    names = dict.fromkeys(chart.name for of_run in charts.values() for chart in of_run)
    merged = []
    for name in names:
        same = {run: chart for run, of_run in charts.items() for chart in of_run if chart.name == name}
        if len(same) > 1:
            series = {
                f"{label} ({run})" if label else run: points
                for run, chart in same.items()
                for label, points in chart.series.items()
            }
            merged.append(replace(next(iter(same.values())), name=f"{kind}-{name}", series=series))
    return merged
