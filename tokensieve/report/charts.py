"""Charts of estimates: every point with its 95% interval, as SVG, and the same figures as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

from tokensieve.report.plots import AMBER, BLUE, GREEN, INK, MUTED, RC, RED, VIOLET, figure, svg

COLORS = {"dense": INK, "before": INK, "sparse": BLUE, "window": AMBER, "sinks": VIOLET, "oracle": GREEN}
OTHERS = (RED, MUTED, GREEN, AMBER, VIOLET, BLUE)
MARKERS = "osD^vP"  # of arms with one color, such as sparse of several k
ROW, REST = 0.22, 1.3  # inches of a point in a chart of names, and of all around the points

Estimates = Mapping[str, Any]  # `evals.intervals.Estimate` as JSON has it


@dataclass(frozen=True)
class Chart:
    """series: {name: [(place, estimate)]}. A place is a number, or a name that stands at the side.

    name: of its files. x: what the places are. y: what is estimated. mark: a value that others are compared with. log:
    places are drawn by their logarithm. above: values that are not drawn, since they would flatten the rest; the CSV
    holds them, and the whole of intervals that leave the frame.
    """

    name: str
    title: str
    caption: str
    series: Mapping[str, Sequence[tuple[float | str, Estimates]]]
    x: str
    y: str
    mark: float | None = None
    log: bool = False
    above: float | None = None

    def csv(self) -> str:
        """Rows of series, place, value, low, high, n, clusters; a bound that so few prompts do not give is empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("series", self.x, self.y, "low", "high", "n", "clusters"))
        for name, points in self.series.items():
            for place, e in points:
                writer.writerow((name, place, e["value"], e["low"], e["high"], e["n"], e.get("clusters")))
        return text.getvalue()

    @property
    def left_out(self) -> str:
        """Which points are not drawn and whether some have no interval, in words; empty if there are none."""
        far = [
            f"{name} at {place} ({e['value']:.2f})"
            for name, points in self.series.items()
            for place, e in points
            if self.above is not None and e["value"] > self.above
        ]
        said = [f"Far above and not drawn: {', '.join(far)}."] if far else []
        if any(e["low"] is None and e["n"] is not None for points in self.series.values() for _, e in points):
            said.append("A point without a bar is of a single document or context, which bounds nothing.")
        return " ".join(said)

    def svg(self) -> str:
        """The chart as an <svg> element of a page."""
        named = any(isinstance(place, str) for points in self.series.values() for place, _ in points)
        with mpl.rc_context(RC):
            return self._names() if named else self._numbers()

    def _drawn(self) -> dict[str, list[tuple[float | str, Estimates]]]:
        limit = float("inf") if self.above is None else self.above
        return {name: [(x, e) for x, e in points if e["value"] <= limit] for name, points in self.series.items()}

    def _names(self) -> str:
        """A line for each name, and on it a point for each series."""
        drawn = self._drawn()
        names = [*dict.fromkeys(str(place) for points in self.series.values() for place, _ in points)]
        lines = len(names) * (len(drawn) + 1)
        chart, axes = figure(self.name, height=REST + ROW * lines)
        for row, (label, points) in enumerate(drawn.items()):
            at = [(names.index(str(place)) * (len(drawn) + 1) + row, e) for place, e in points]
            style = _style(label, [*drawn])
            for y, e in at:
                if e["low"] is not None:
                    axes.hlines(y, e["low"], e["high"], color=style["color"], linewidth=1.4)
            axes.plot([e["value"] for _, e in at], [y for y, _ in at], linestyle="", label=label, **style)
        axes.set_ylim(lines - 0.5, -0.8)
        axes.set_xlim(*self._limits())
        axes.set_yticks([i * (len(drawn) + 1) + (len(drawn) - 1) / 2 for i in range(len(names))], names)
        axes.set_xlabel(self.y)
        if self.mark is not None:
            axes.axvline(self.mark, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.grid(True, axis="x")
        return self._finished(chart, axes)

    def _numbers(self) -> str:
        drawn = self._drawn()
        chart, axes = figure(self.name, height=3.8)
        places = sorted({float(place) for points in self.series.values() for place, _ in points})
        gap = min((b - a for a, b in pairwise(places)), default=1.0)
        for row, (label, points) in enumerate(drawn.items()):
            side = (row - (len(drawn) - 1) / 2) / max(1, len(drawn))  # beside each other, lest intervals hide others
            xs = [float(x) * 1.1**side if self.log else float(x) + 0.3 * gap * side for x, _ in points]
            style = _style(label, [*drawn])
            for x, (_, e) in zip(xs, points, strict=True):
                if e["low"] is not None:
                    axes.vlines(x, e["low"], e["high"], color=style["color"], linewidth=1.4)
            axes.plot(xs, [e["value"] for _, e in points], label=label, linewidth=1.2, **style)
        if self.log:
            axes.set_xscale("log", base=2)
            axes.set_xticks(places, [f"{x:,.0f}" for x in places], minor=False)
            axes.minorticks_off()
        elif len(places) < 12:
            axes.set_xticks(places, [f"{x:,.0f}" for x in places])
        axes.set_xlabel(self.x)
        axes.set_ylabel(self.y)
        axes.set_ylim(*self._limits())
        if self.mark is not None:
            axes.axhline(self.mark, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.grid(True, axis="y")
        return self._finished(chart, axes)

    def _limits(self) -> tuple[float, float]:
        """Of the axis of values. They hold every value; an interval is cut that would flatten the others."""
        drawn = [e for points in self._drawn().values() for _, e in points]
        values = [e["value"] for e in drawn] + ([] if self.mark is None else [self.mark])
        low, high = min(values, default=0.0), max(values, default=1.0)
        reach = max(high - low, 0.02 * abs(high), 1e-9)
        lows = [low, *(e["low"] for e in drawn if e["low"] is not None)]
        highs = [high, *(e["high"] for e in drawn if e["high"] is not None)]
        return max(min(lows), low - reach) - 0.05 * reach, min(max(highs), high + reach) + 0.05 * reach

    def _finished(self, chart: Any, axes: Axes) -> str:
        axes.tick_params(length=0)
        if len(self.series) > 1:
            columns = 3 if max(map(len, self.series)) < 16 else 2
            chart.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
        return svg(chart, self.title)


def _style(label: str, labels: Sequence[str]) -> dict[str, Any]:
    """Color and marker of a series; those of one kind, such as "sparse k=128" and "sparse k=512", share the color."""
    kinds = [*dict.fromkeys(name.partition(" ")[0] for name in labels)]
    kind = label.partition(" ")[0]
    others = dict(zip((name for name in kinds if name not in COLORS), cycle(OTHERS), strict=False))
    like = [name for name in labels if name.partition(" ")[0] == kind]
    color = COLORS[kind] if kind in COLORS else others[kind]
    return {"color": color, "marker": MARKERS[like.index(label) % len(MARKERS)], "markersize": 4.5}
