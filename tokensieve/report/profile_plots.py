"""The figures of `tokensieve profile`, in the manner of `plots`: stand-in colors that the page replaces."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tokensieve.report.plots import AMBER, BLUE, GREEN, MUTED, RC, VIOLET, figure, svg

SHADES = (BLUE, VIOLET, GREEN, AMBER)
DASHED, DOTTED = (0, (4, 2)), (0, (2, 2))


def lengths_plot(lengths: Mapping[str, Any], marks: Mapping[str, int]) -> str:
    """The share of the documents and of their tokens by the document's length, with `marks`: name -> tokens."""
    histogram = lengths["histogram"]
    edges = histogram["edges"]
    with mpl.rc_context(RC):
        drawn, axes = figure("lengths", height=3.6)
        for name, color, width in (("tokens", BLUE, 2.4), ("documents", MUTED, 1.6)):
            shares = [100 * count / lengths[name] for count in histogram[name]]
            axes.stairs(shares, edges, color=color, linewidth=width, label=name, fill=False)
        _tokens_axis(axes, edges[0], edges[-1], "tokens of a document")
        _marks(axes, {name: tokens for name, tokens in marks.items() if edges[0] <= tokens <= edges[-1]})
        axes.set_ylim(bottom=0)
        axes.set_ylabel("percent")
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return svg(drawn, "Documents and their tokens by the length of the document")


def mass_plot(attention: Mapping[str, Any], wanted: float) -> str:
    """The mass of the best k keys against k: the mean, its interval, and the range of the layers."""
    found = {int(k): mass for k, mass in attention["mass"].items() if mass["n"]}
    layers = [attention["mass_by_layer"][str(k)] for k in found]
    with mpl.rc_context(RC):
        drawn, axes = figure("mass", height=3.6)
        axes.fill_between(
            [*found], [min(x) for x in layers], [max(x) for x in layers], color=BLUE, alpha=0.15, linewidth=0,
            label="from layer to layer",
        )  # fmt: skip
        means = [mass["value"] for mass in found.values()]
        below = [0.0 if m["low"] is None else m["value"] - m["low"] for m in found.values()]
        axes.errorbar(
            [*found], means, yerr=below, color=BLUE, linewidth=1.8, marker="o", markersize=4, capsize=3,
            label="mean of the layers, 95% interval",
        )  # fmt: skip
        axes.axhline(wanted, color=GREEN, linewidth=1.2, linestyle=DASHED)
        axes.annotate(f"asked for: {wanted:.2f}", (0.0, wanted), xycoords=("axes fraction", "data"), xytext=(4, 3),
                      textcoords="offset points", va="bottom", fontsize=9, color=GREEN)  # fmt: skip
        _tokens_axis(axes, min(found), max(found), "k, keys per query", [*found])
        axes.set_ylim(top=1.01)
        axes.set_ylabel("share of the attention's mass")
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return svg(drawn, "Share of the attention's mass in the best k keys, against k")


def positions_plot(attention: Mapping[str, Any]) -> str:
    """The mass of the best k keys against the number of keys that a query sees, a curve for each of some k."""
    rows, ks = attention["mass_by_position"], attention["top_k"]
    shown = [k for k in ks if sum(row["to"] > k for row in rows) > 1][-len(SHADES) :] or ks[:1]
    with mpl.rc_context(RC):
        drawn, axes = figure("positions", height=3.6)
        for k, color in zip(shown, SHADES, strict=False):
            points = [((row["from"] * row["to"]) ** 0.5, row["mass"][ks.index(k)]) for row in rows if row["to"] > k]
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=f"k = {k:,}")
        _tokens_axis(axes, rows[0]["from"], rows[-1]["to"], "keys that a query sees")
        axes.set_ylabel("share of the attention's mass")
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return svg(drawn, "Share of the attention's mass in the best k keys, against the keys that a query sees")


def layers_plot(attention: Mapping[str, Any], k: int, limit: float) -> str:
    """By layer: the mass of its best k keys, and the share of it that the best keys of the layer before hold."""
    masses, losses = attention["mass_by_layer"][str(k)], attention["loss"][str(k)]
    with mpl.rc_context(RC):
        drawn, axes = figure("layers", height=3.6)
        axes.plot(range(len(masses)), masses, color=BLUE, marker="o", markersize=4, label="held by its best keys")
        if losses:
            kept = [1.0 - loss for loss in losses]
            axes.plot(
                range(1, len(masses)), kept, color=VIOLET, marker="o", markersize=4, linestyle=DASHED,
                label="of that, held by those of the layer before",
            )  # fmt: skip
        axes.axhline(1.0 - limit, color=GREEN, linewidth=1.2, linestyle=DOTTED, label="enough to share")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(top=1.01)
        axes.set_xlabel("layer")
        axes.set_ylabel("share of the attention's mass")
        axes.grid(True, axis="y")
        axes.tick_params(length=0)
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return svg(drawn, f"Share of the attention's mass in the best {k} keys, by layer")


def standalone(drawn: str) -> str:
    """The element of a page as a file of its own, with the page's colors, light and dark."""
    palette = files("tokensieve.report").joinpath("palette.css.j2").read_text(encoding="utf-8")
    style = f"<style>{palette}svg {{ background: var(--card); font-family: system-ui, sans-serif; }}</style>"
    head, bracket, rest = drawn.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"{bracket}{style}{rest}\n'


def _tokens_axis(axes: Axes, begin: float, end: float, name: str, ticks: Sequence[int] = ()) -> None:
    axes.set_xscale("log", base=2)
    powers = [1 << i for i in range(31) if begin <= 1 << i <= end]
    every = max(1, -(-len(powers) // 8))
    shown = list(ticks or powers[len(powers) % every :: every])
    axes.set_xticks(shown, [_short(tokens) for tokens in shown], minor=False)
    axes.minorticks_off()
    axes.set_xlabel(name)
    axes.grid(True, axis="y")
    axes.tick_params(length=0)


def _marks(axes: Axes, marks: Mapping[str, int]) -> None:
    """Lines with names above the axes; of two that are close, the later name goes one line higher."""
    found = sorted(marks.items(), key=lambda mark: mark[1])
    close = {name for (_, a), (name, b) in pairwise(found) if b < 4 * a}
    for name, tokens in found:
        axes.axvline(tokens, color=MUTED, linewidth=0.8, linestyle=DOTTED)
        axes.annotate(
            f" {name}", (tokens, 1.0), xycoords=("data", "axes fraction"), fontsize=9, color=MUTED, va="bottom",
            xytext=(0, 11 if name in close else 0), textcoords="offset points",
        )  # fmt: skip


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"
