"""What `tokensieve cost` writes and prints: cost.json, cost.csv, the plot, and tables for a terminal."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from tokensieve import cost
from tokensieve.cost import paper
from tokensieve.files import write_json, write_text
from tokensieve.report.cost_plots import cost_plot
from tokensieve.report.table import table

CURVE = tuple(range(0, 131073, 2048))  # positions at which the plot of --paper has points


def write_costs(
    folder: Path, model: str, serving: cost.Serving, rates: cost.Rates, price: float, costs: Sequence[cost.TokenCost]
) -> None:
    """Writes cost.json (with every part of every token), cost.csv and cost.svg to a folder."""
    rows = [_row(token, price) for token in costs]
    parts = [{"parts": [asdict(part) for part in (*token.parts, token.exchange)]} for token in costs]
    figures = {
        "model": model,
        "usd_per_gpu_hour": price,
        "serving": asdict(serving),
        "rates": asdict(rates),
        "rows": [{**row, **more} for row, more in zip(rows, parts, strict=True)],
    }
    write_json(folder / "cost.json", figures)
    _write_csv(folder / "cost.csv", rows)
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        curve = curves.setdefault(f"{row['phase']}_{row['attention']}", {})
        curve[row["position"]] = row["usd_per_million"]
    write_text(folder / "cost.svg", cost_plot(curves))


def write_paper(folder: Path) -> dict[str, Any]:
    """Writes cost.json, cost.csv and cost.svg of Figure 3 to a folder; returns what is in cost.json.

    {curve: {position: dollars per million tokens}, "parameters": {name: share}, "why": {name: reason}, "paper": the
    report's curves, "measured": the curves with shares measured on an H200 in place of the fitted ones,
    "usd_per_gpu_hour"}.
    """
    measured = cost.known_rates(paper.PREFILL, paper.published_shape())

    def curves(rates: cost.Rates | None) -> dict[str, dict[str, float]]:
        return {
            name: {str(p): paper.paper_cost(name, p, rates).usd_per_million(paper.PRICE) for p in paper.POSITIONS}
            for name in paper.FIGURE_3
        }

    figures: dict[str, Any] = {
        **curves(None),
        "parameters": {name: parameter.value for name, parameter in paper.PARAMETERS.items()},
        "why": {name: parameter.reason for name, parameter in paper.PARAMETERS.items()},
        "paper": {name: dict(zip(map(str, paper.POSITIONS), values)) for name, values in paper.FIGURE_3.items()},
        "measured": curves(measured),
        "usd_per_gpu_hour": paper.PRICE,
    }
    curve = {name: {p: paper.paper_cost(name, p) for p in CURVE} for name in paper.FIGURE_3}
    rows = [
        {**_row(token, paper.PRICE), "paper_usd_per_million": figures["paper"][name].get(str(p), "")}
        for name, tokens in curve.items()
        for p, token in tokens.items()
    ]
    write_json(folder / "cost.json", figures)
    _write_csv(folder / "cost.csv", rows)
    drawn = {name: {p: t.usd_per_million(paper.PRICE) for p, t in tokens.items()} for name, tokens in curve.items()}
    write_text(folder / "cost.svg", cost_plot(drawn, figures["paper"]))
    return figures


def _row(token: cost.TokenCost, price: float) -> dict[str, Any]:
    return {
        "phase": token.phase,
        "attention": "sparse" if token.sparse else "dense",
        "position": token.context - 1,
        "batch": token.batch,
        "flops": token.flops,
        "bytes": token.bytes,
        "exchange_bytes": token.exchange.bytes,
        "gpu_seconds": token.seconds,
        "usd_per_million": token.usd_per_million(price),
        "bound": token.bound,
        "label": token.label,
    }


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def show_costs(
    console: Console, model: str, serving: cost.Serving, price: float, costs: Sequence[cost.TokenCost]
) -> None:
    """Prints a row for each phase, attention and position."""
    divided = f"attention over {serving.tensor}, experts over {serving.gpus}"
    console.print(
        f"{model} on {serving.gpu.name} at {price:g} USD an hour: {divided}; weights {serving.weights}, cache "
        f"{serving.cache}, index {serving.index}",
        highlight=False,
    )
    heads = (
        "phase",
        "attention",
        "position",
        "batch",
        "GFLOP",
        "MB",
        "GPU us",
        "USD/M tokens",
        "bound by",
        "share of peak",
    )
    rows = table(*heads)
    for token in costs:
        row = _row(token, price)
        rows.add_row(
            row["phase"],
            row["attention"],
            f"{row['position']:,}",
            "" if token.batch is None else str(token.batch),
            _number(token.flops / 1e9),
            _number(token.bytes / 1e6),
            _number(token.seconds * 1e6),
            f"{row['usd_per_million']:.3g}",
            token.bound,
            token.label,
        )
    console.print(rows)


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.4g}"


def show_paper(console: Console, figures: Mapping[str, Any]) -> None:
    """Prints the parameters, and the four curves beside the report's."""
    fitted = table("parameter", "share", "")
    for name, value in figures["parameters"].items():
        fitted.add_row(name, f"{value:.2f}", figures["why"][name])
    console.print(fitted)
    rows = table("USD/M tokens", "position", "report", "fitted", "", "measured shares", "")
    for name, read_off in figures["paper"].items():
        for position, value in read_off.items():
            found, measured = figures[name][position], figures["measured"][name][position]
            shown = (f"{value:.3f}", f"{found:.3f}", f"{found / value - 1:+.1%}", f"{measured:.3f}")
            rows.add_row(name.replace("_", ", "), f"{int(position):,}", *shown, f"{measured / value - 1:+.1%}")
    console.print(rows)


def show_balances(console: Console, found: Mapping[str, Any]) -> None:
    """Prints what each price list earns on the traffic, and whether costs fall as far as prices."""
    console.print(
        f"\n{found['requests']:,} requests, {found['lists'][0]['cached']:.0%} of their prompts' tokens from a cache; "
        f"an output token sees {found['mean_context']:,} tokens in the mean",
        highlight=False,
    )
    rows = table("price list", "attention", "", "tokens", "income, USD", "cost, USD", "margin")
    for entry in found["lists"]:
        for part in ("input", "output", "together"):
            figures = entry[part]
            margin = "" if figures["margin"] is None else f"{figures['margin']:+.0%}"
            named = (entry["name"], entry["attention"]) if part == "input" else ("", "")
            money = (f"{figures['income']:,.4g}", f"{figures['cost']:,.4g}")
            rows.add_row(*named, part, f"{figures['tokens']:,}", *money, margin)
    console.print(rows)
    if found["cut"] is None:
        return
    for part in ("input", "output"):
        cut = found["cut"][part]
        falls = "nothing is spent" if cut["cost"] is None else f"the cost on this traffic to {cut['cost']:.2f}"
        reach = f"from position {cut['position']:,} on" if cut["position"] is not None else "at no position looked at"
        console.print(
            f"{part}: the price falls to {cut['price']:.2f} from {found['cut']['from']} to {found['cut']['to']}, "
            f"{falls}; a token's cost falls as far {reach}",
            highlight=False,
        )
