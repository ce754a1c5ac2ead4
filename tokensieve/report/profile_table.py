"""The figures of `tokensieve profile` as tables and sentences for a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from tokensieve import cost
from tokensieve.report.table import table

STAGES = {"warmup": "warm-up", "adapt": "adaptation"}


def show_profile(console: Console, metrics: Mapping[str, Any]) -> None:
    """Prints the lengths, the mass by k, the recommendation with its reasons, and what training would cost."""
    console.print(lengths_text(metrics["lengths"]), highlight=False)
    lengths = table("tokens of a document", *(quantile_name(q) for q in metrics["lengths"]["quantiles"]))
    lengths.add_row("", *(f"{n:,.0f}" for n in metrics["lengths"]["quantiles"].values()))
    past = table("tokens past position", *(f"{int(p):,}" for p in metrics["lengths"]["tokens_past"]))
    past.add_row("", *(f"{share:.1%}" for share in metrics["lengths"]["tokens_past"].values()))
    for part in (lengths, past):
        console.print(part)
    console.print()
    if metrics["attention"]["texts"]:
        console.print(attention_text(metrics["attention"]), highlight=False)
        masses = table("k", "mass held", "95% interval", "texts", "worst layer", "common with the layer before")
        for row in mass_rows(metrics["attention"]):
            masses.add_row(*row)
        console.print(masses)
        console.print()
    for answer, reason in answers(metrics["advice"]):
        console.print(f"[bold]{answer}[/bold]: {reason}.", highlight=False)
    if metrics["spent"]:
        console.print(spent_text(metrics["spent"]), highlight=False)
    if metrics["training"]:
        console.print()
        training = table("training", "tokens", "FLOPs", "memory", "time", "")
        for row in training_rows(metrics["training"]):
            training.add_row(*row)
        console.print(training)


def lengths_text(lengths: Mapping[str, Any]) -> str:
    sample = "all of the source" if lengths["whole"] else "a sample of the source, which holds more"
    return (
        f"{lengths['documents']:,} documents, {lengths['tokens']:,} tokens, {lengths['bytes'] / 1e6:.1f} MB of text: "
        f"{sample}"
    )


def quantile_name(q: str) -> str:
    return {"0.5": "median", "1": "longest"}.get(q, f"{100 * float(q):g}%")


def attention_text(attention: Mapping[str, Any]) -> str:
    wanted = attention["texts_wanted"]
    left = "" if attention["texts"] == wanted else f" of {wanted}, for want of time"
    return (
        f"Attention in {attention['texts']} texts{left}, of at most {attention['context']:,} tokens: "
        f"{attention['queries']:,} queries in each layer, {cost.duration(attention['seconds'])}"
    )


def mass_rows(attention: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(k, mass, interval, texts, worst layer's mass, keys that neighbouring layers have in common), as text."""
    rows: list[tuple[str, ...]] = []
    for k, mass in attention["mass"].items():
        if not mass["n"]:
            rows.append((f"{int(k):,}", "", "", "0", "", "no text is longer"))
            continue
        interval = "" if mass["low"] is None else f"{mass['low']:.3f} to {min(1.0, mass['high']):.3f}"
        by_layer, common = attention["mass_by_layer"][k], attention["overlap"][k]
        worst = min(range(len(by_layer)), key=by_layer.__getitem__)
        shared = f"{min(common):.0%} to {max(common):.0%}" if common else ""
        rows.append(
            (
                f"{int(k):,}",
                f"{mass['value']:.3f}",
                interval,
                str(mass["n"]),
                f"{by_layer[worst]:.3f} ({worst})",
                shared,
            )
        )
    return rows


def answers(advice: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(answer, reason) for each part of the recommendation that has a reason."""
    groups = ", ".join(f"{group[0]} to {group[-1]}" for group in advice["groups"] if len(group) > 1)
    shown = {
        "verdict": "Use sparse attention" if advice["verdict"] == "sparse" else "Stay with dense attention",
        "top_k": f"k = {advice['top_k'] or 0:,}",
        "dense_below": f"Stay dense below {advice['dense_below'] or 0:,} tokens",
        "groups": f"Layers {groups} can share an indexer" if groups else "Every layer needs its own indexer",
    }
    return [(answer, advice["reasons"][part]) for part, answer in shown.items() if part in advice["reasons"]]


def spent_text(spent: Mapping[str, float]) -> str:
    return (
        f"On these documents it would take {spent['prompt_flops']:.0%} of the dense model's FLOPs to read them, and "
        f"read {spent['token_bytes']:.0%} of its bytes of cache to write them, if shorter ones stay dense."
    )


def training_rows(training: list[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """(stage, tokens, FLOPs, memory, time, where its speed is from), as text."""
    return [
        (
            STAGES[stage["stage"]],
            f"{stage['tokens']:,}",
            f"{stage['flops']:.1e}",
            f"{stage['memory_bytes'] / 2**30:.1f} GiB",
            "" if stage["seconds"] is None else cost.time_range(stage["seconds"]),
            stage["speed"],
        )
        for stage in training
    ]
