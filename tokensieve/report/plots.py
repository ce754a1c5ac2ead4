"""The report's figures as SVG text, drawn by matplotlib and colored by the page.

Matplotlib knows only fixed colors, and the page has a light and a dark face. So every color here is a stand-in that
becomes a CSS variable in the text of the SVG; letters stay letters, in the page's font.
"""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

INK, MUTED, GRID, ON_FILL = "#010101", "#020202", "#030303", "#040404"
BLUE, GREEN, AMBER, RED, VIOLET = "#050505", "#060606", "#070707", "#080808", "#090909"
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    ON_FILL: "on-fill",
    BLUE: "blue",
    GREEN: "green",
    AMBER: "amber",
    RED: "red",
    VIOLET: "violet",
}

STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": INK, "linewidth": 1.6},
    "dense_adapted": {"color": MUTED, "linewidth": 1.6, "linestyle": (0, (4, 2))},
    "sparse": {"color": BLUE, "linewidth": 2.6},
    "oracle": {"color": GREEN, "linewidth": 1.6, "linestyle": (0, (1, 1.2))},
    "window": {"color": AMBER, "linewidth": 1.6},
    "untrained_indexer": {"color": RED, "linewidth": 1.6},
}
OFF_SCALE = 1.5  # nats above dense, beyond which an arm would flatten all the others: it is named instead of drawn

RC = {
    "svg.fonttype": "none",
    "font.size": 10.0,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    # Room for the larger letters that the page gives figures on a phone.
    "legend.columnspacing": 3.2,
    "axes.labelpad": 8.0,
}


def label(arm: str) -> str:
    return arm.replace("_", " ")


def figure(name: str, width: float = 5.4, height: float = 3.3) -> tuple[Figure, Axes]:
    """Width and height in inches, small enough that the letters can be read when a phone scales the figure down."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    drawn.patch.set_alpha(0.0)
    axes = drawn.add_subplot()
    axes.patch.set_alpha(0.0)
    axes.set_axisbelow(True)
    drawn.set_gid(name)
    return drawn, axes


def svg(drawn: Figure, title: str) -> str:
    """The figure as an <svg> element without metadata, fixed size, namespaces or ids that nothing refers to."""
    name = drawn.get_gid() or "figure"
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'\s+xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?)\s+width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\s+height="[^"]*"', r"\1", text, count=1)
    used = set(re.findall(r"#([A-Za-z][\w-]*)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, f"var(--{variable})")
    # Fonts come from the page; sizes stay.
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r"\n\s*", "\n", text).strip()
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _grid(axes: Axes) -> None:
    axes.grid(True, axis="y")
    axes.tick_params(length=0)


def _steps(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[int], list[Mapping[str, Any]]]]:
    """(stage, running step over all stages, rows) in the order in which the stages ran."""
    stages: list[tuple[str, list[int], list[Mapping[str, Any]]]] = []
    begin = 0
    for stage in dict.fromkeys(row["stage"] for row in history):
        rows = [row for row in history if row["stage"] == stage]
        stages.append((stage, [begin + int(row["step"]) for row in rows], rows))
        begin += max(int(row["step"]) for row in rows)
    return stages


def _mark_stages(axes: Axes, stages: Sequence[tuple[str, list[int], Any]]) -> None:
    for stage, steps, _ in stages[1:]:
        axes.axvline(min(steps) - 0.5, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.annotate(
            stage, (min(steps), 1.0), xycoords=("data", "axes fraction"), fontsize=9, color=MUTED, va="bottom"
        )
    if stages:
        axes.annotate(stages[0][0], (0.0, 1.0), xycoords="axes fraction", fontsize=9, color=MUTED, va="bottom")


def kl_plot(history: Sequence[Mapping[str, Any]]) -> str:
    """The KL of the first stage, warm-up: that of adaptation is another quantity."""
    with mpl.rc_context(RC):
        drawn, axes = figure("kl")
        _, steps, rows = _steps(history)[0]
        points = [(x, row["kl"]) for x, row in zip(steps, rows, strict=True) if row.get("kl") is not None]
        if points:
            marker = "o" if len(points) < 3 else None
            axes.plot(*zip(*points), color=BLUE, linewidth=1.8, marker=marker, markersize=4)
        axes.set_xlabel("step")
        axes.set_ylabel("KL, nats per query")
        axes.set_ylim(bottom=0)
        _grid(axes)
        return svg(drawn, "KL of the indexer against training step")


def recall_plot(history: Sequence[Mapping[str, Any]], bound: float) -> str:
    with mpl.rc_context(RC):
        drawn, axes = figure("recall")
        stages = _steps(history)
        points = [
            (x, row["recall"])
            for _, steps, rows in stages
            for x, row in zip(steps, rows, strict=True)
            if row.get("recall") is not None
        ]
        if points:
            axes.plot(*zip(*points), color=BLUE, linewidth=1.8, marker="o", markersize=4)
        axes.axhline(bound, color=GREEN, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.annotate(f"needed: {bound:.2f}", (1.0, bound), xycoords=("axes fraction", "data"), xytext=(0, -4),
                      textcoords="offset points", ha="right", va="top", fontsize=9, color=GREEN)  # fmt: skip
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("step")
        axes.set_ylabel("recall of the attention mass")
        _mark_stages(axes, stages)
        _grid(axes)
        return svg(drawn, "Recall of the indexer against training step")


def loss_plot(by_position: Mapping[str, Any], top_k: int) -> str:
    losses = by_position["loss"]
    shown = [arm for arm in losses if _above_dense(by_position, arm, top_k) <= OFF_SCALE]
    with mpl.rc_context(RC):
        drawn, axes = figure("loss", height=3.6)
        _by_position(axes, by_position["edges"], {arm: losses[arm] for arm in shown}, top_k)
        beyond = [f"{label(arm)}: {losses[arm][-1]:.1f} nats, above the scale" for arm in losses if arm not in shown]
        if beyond:  # above the axes, where no curve is
            axes.set_title("\n".join(beyond), fontsize=9, color=RED, loc="right", pad=14)
        axes.set_ylabel("loss, nats per token")
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return svg(drawn, "Loss by position in the context, for every arm")


def difference_plot(by_position: Mapping[str, Any], top_k: int) -> str:
    """The same losses minus dense attention's: text is not equally hard everywhere, and this takes that away."""
    losses = by_position["loss"]
    differences = {
        arm: [a - b for a, b in zip(values, losses["dense"], strict=True)]
        for arm, values in losses.items()
        if arm != "dense" and _above_dense(by_position, arm, top_k) <= OFF_SCALE
    }
    with mpl.rc_context(RC):
        drawn, axes = figure("difference", height=3.6)
        axes.axhline(0, **STYLES["dense"], label="dense")
        _by_position(axes, by_position["edges"], differences, top_k)
        axes.set_ylabel("loss minus dense, nats")
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return svg(drawn, "Loss by position minus that of dense attention, for every arm")


def _above_dense(by_position: Mapping[str, Any], arm: str, top_k: int) -> float:
    """Mean over the stretches beyond k."""
    edges, losses = by_position["edges"], by_position["loss"]
    stretches = [i for i, begin in enumerate(edges[:-1]) if begin >= top_k] or [len(edges) - 2]
    return sum(losses[arm][i] - losses["dense"][i] for i in stretches) / len(stretches)


def _by_position(axes: Axes, edges: Sequence[int], curves: Mapping[str, Sequence[float]], top_k: int) -> None:
    centers = [(a + b) / 2 for a, b in pairwise(edges)]
    for arm, values in curves.items():
        # The thick line goes below the others, which it would hide where they agree.
        axes.plot(
            centers,
            values,
            label=label(arm),
            zorder=1.9 if arm == "sparse" else 2,
            **STYLES.get(arm, {"color": VIOLET}),
        )
    axes.axvline(top_k, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.annotate(
        f" k = {top_k}", (top_k, 1.0), xycoords=("data", "axes fraction"), fontsize=9, color=MUTED, va="bottom"
    )
    axes.set_xlabel("tokens of context")
    axes.set_xlim(0, edges[-1])
    _grid(axes)


def heat_plot(heat: Mapping[str, Any], arm: str) -> str:
    lengths, rows, counts = heat["lengths"], heat["accuracy"], heat["counts"]
    with mpl.rc_context(RC):
        drawn, axes = figure(f"heat-{arm}", height=0.9 + 0.56 * len(lengths))
        color = BLUE if arm == "sparse" else MUTED
        for y, (row, asked) in enumerate(zip(rows, counts, strict=True)):
            for x, share in enumerate(row):
                if share is None or not asked[x]:
                    axes.text(x + 0.5, y + 0.5, "–", ha="center", va="center", fontsize=9, color=MUTED)
                    continue
                # Letters on a fill need a strong one behind them, letters in the page's ink a weak one.
                strong = share >= 0.5
                alpha = 0.1 + (0.9 if strong else 0.4) * share
                axes.add_patch(Rectangle((x + 0.04, y + 0.06), 0.92, 0.88, facecolor=color, alpha=alpha, linewidth=0))
                letters = ON_FILL if strong else INK
                axes.text(x + 0.5, y + 0.36, f"{100 * share:.0f}", ha="center", va="center", fontsize=9, color=letters)
                axes.text(x + 0.5, y + 0.74, f"of {asked[x]}", ha="center", va="center", fontsize=7, color=letters)
        axes.set_xlim(0, 10)
        axes.set_ylim(len(lengths), 0)
        axes.set_xticks(range(0, 11, 2), [f"{10 * i}%" for i in range(0, 11, 2)])
        axes.set_yticks([y + 0.5 for y in range(len(lengths))], [f"{n:,}" for n in lengths])
        axes.set_xlabel("depth in the context")
        axes.set_ylabel("tokens")
        axes.set_title(label(arm), fontsize=10, loc="left")
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(length=0)
        return svg(drawn, f"Share of needles found by depth and length, {label(arm)}")


def _by_context(figures: Mapping[str, float]) -> tuple[list[int], list[float]]:
    contexts = sorted(int(c) for c in figures)
    return contexts, [figures[str(c)] for c in contexts]


def reads_plot(reads: Mapping[str, Mapping[str, float]]) -> str:
    """Bytes of cache that one token reads, of all layers."""
    mib = {name: {c: n / 2**20 for c, n in by.items()} for name, by in reads.items()}
    with mpl.rc_context(RC):
        drawn, axes = figure("reads")
        for name in ("dense", "sparse"):
            axes.plot(*_by_context(mib[name]), marker="o", markersize=4, label=name, **STYLES[name])
        axes.plot(*_by_context(mib["index_keys"]), label="of which index keys", color=VIOLET, linewidth=2.4,
                  linestyle=(0, (2, 2)))  # fmt: skip
        _context_axis(axes, mib["dense"])
        axes.set_ylim(bottom=0)
        axes.set_ylabel("MiB read per token")
        _grid(axes)
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return svg(drawn, "MiB of cache read per decoded token against context")


def time_plot(ms: Mapping[str, Mapping[str, float]], what: str) -> str:
    """Milliseconds of `what`, for instance "a token", against context."""
    with mpl.rc_context(RC):
        drawn, axes = figure(f"time-{what.replace(' ', '-')}")
        for name, figures in ms.items():
            axes.plot(
                *_by_context(figures), marker="o", markersize=4, label=name, **STYLES.get(name, {"color": VIOLET})
            )
        _context_axis(axes, next(iter(ms.values())))
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"ms for {what}")
        _grid(axes)
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return svg(drawn, f"Milliseconds for {what} against context")


def _context_axis(axes: Axes, figures: Mapping[str, float]) -> None:
    contexts = sorted(int(c) for c in figures)
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{c // 1024}K" if c % 1024 == 0 else f"{c:,}" for c in contexts], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("tokens of context")
