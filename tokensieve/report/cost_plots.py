"""The plot of costs against token position, as a file of its own."""

from collections.abc import Mapping

import matplotlib as mpl
from matplotlib.figure import Figure

from tokensieve.report.plots import RC, STYLES, svg
from tokensieve.report.templates import render

NAMESPACE = 'xmlns="http://www.w3.org/2000/svg" style="background: var(--page)"'


def cost_plot(
    curves: Mapping[str, Mapping[int, float]], read_off: Mapping[str, Mapping[str, float]] | None = None
) -> str:
    """An SVG file of dollars per million tokens against token position: prefill and decode side by side.

    curves: {"prefill_dense": {position: dollars}, ...}. read_off: the points of another source, drawn as circles.
    """
    with mpl.rc_context(RC):
        drawn = Figure(figsize=(9.0, 3.6), layout="constrained")
        drawn.patch.set_alpha(0.0)
        drawn.set_gid("cost")
        for place, phase in enumerate(("prefill", "decode"), 1):
            axes = drawn.add_subplot(1, 2, place)
            axes.patch.set_alpha(0.0)
            for kind in ("dense", "sparse"):
                curve = curves[f"{phase}_{kind}"]
                marker = "o" if len(curve) < 20 else None
                axes.plot([*curve], [*curve.values()], label=kind, marker=marker, markersize=4, **STYLES[kind])
                points = (read_off or {}).get(f"{phase}_{kind}", {})
                if points:
                    label = "the report, read off" if kind == "dense" else None
                    axes.plot([int(p) for p in points], [*points.values()], "o", color=STYLES[kind]["color"],
                              fillstyle="none", markersize=7, label=label)  # fmt: skip
            axes.set_title(phase, fontsize=10, loc="left")
            axes.set_xlabel("token position")
            axes.set_ylabel("USD per million tokens")
            axes.set_ylim(bottom=0)
            last = max(max(curves[f"{phase}_{kind}"]) for kind in ("dense", "sparse"))
            ticks = [last * i // 4 for i in range(5)]
            axes.set_xticks(ticks, [f"{t // 1024}K" if t % 1024 == 0 else f"{t:,}" for t in ticks])
            axes.grid(True, axis="y")
            axes.tick_params(length=0)
            axes.legend(loc="upper left")
        text = svg(drawn, "Dollars per million tokens against token position, prefill and decode, dense and sparse")
    opening = text.index(">") + 1
    style = f"<style>{render('palette.css.j2')}</style>"
    return text[:opening].replace("<svg", f"<svg {NAMESPACE}", 1) + style + text[opening:]
