"""The recommendation: whether to select, how many keys, from which length on, and which layers can share an indexer.

A function of figures alone. Every part comes with its reason, one sentence.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tokensieve.evals.intervals import Estimate
from tokensieve.profile.concentration import REACH
from tokensieve.profile.crossover import Crossover
from tokensieve.profile_config import ProfileConfig


@dataclass(frozen=True)
class Advice:
    """verdict: "sparse", or "dense" for staying with dense attention. top_k: the k that holds enough, if there is one.

    dense_below: tokens of the shortest text for which sparse is cheaper. groups: adjacent layers that can share an
    indexer, the first of each has it. reasons: a sentence for each of "verdict", "top_k", "dense_below" and "groups";
    the last two are there if the verdict is "sparse".
    """

    verdict: str
    top_k: int | None
    dense_below: int | None
    groups: list[list[int]]
    reasons: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def advise(
    mass: Mapping[int, Estimate],
    past: Callable[[int], float],
    crossover_of: Callable[[int], Crossover],
    loss: Callable[[int, int, int], float],
    layers: int,
    positions: int,
    settings: ProfileConfig,
) -> Advice:
    """The recommendation for one model and one source.

    Args:
        mass: k -> mass that the best k keys hold; an estimate from 0 texts is of a k that no text is longer than.
        past: the share of the source's tokens that see more than so many keys.
        crossover_of: k -> lengths from which on sparse is cheaper.
        loss: (k, source, layer) -> share of the mass that a layer loses by the best k keys of an earlier one.
        positions: that the model knows.
        settings: the thresholds.
    """
    measured = [k for k in sorted(mass) if mass[k].n]
    if not measured:
        smallest = min(mass)
        why = (
            f"no text has more than {smallest:,} tokens, and a query that sees no more than k keys selects all of them"
        )
        return Advice("dense", None, None, [], {"verdict": why})
    k = next((k for k in measured if mass[k].value >= settings.mass), None)
    if k is None:
        why = (
            f"attention is too spread: the best {measured[-1]:,} keys, the most that could be tried, hold "
            f"{_share(mass[measured[-1]])} of its mass, and {settings.mass:.2f} is asked for"
        )
        return Advice("dense", None, None, [], {"verdict": why})
    reasons = {"top_k": _reason_for_k(k, measured, mass, settings)}
    cheaper, beyond = crossover_of(k), past(k)
    below = cheaper.dense_below
    if beyond < settings.tokens_past_k:
        reasons["verdict"] = (
            f"the data is mostly shorter than k = {k:,}: {beyond:.0%} of its tokens see more than k keys, and "
            f"{settings.tokens_past_k:.0%} is asked for; the others attend to every key with and without selection"
        )
    elif below is None or below > positions:
        reasons["verdict"] = (
            "sparse attention is not cheaper within the model's "
            f"{positions:,} positions ({_lengths(cheaper)}), index scores included"
        )
    elif not past(below):
        reasons["verdict"] = (
            f"no text reaches the {below:,} tokens from which on sparse attention is cheaper ({_lengths(cheaper)})"
        )
    if "verdict" in reasons or below is None:
        return Advice("dense", k, below, [], reasons)
    reasons["verdict"] = (
        f"{beyond:.0%} of the tokens see more than k = {k:,} keys, which hold {_share(mass[k])} of the attention's mass"
    )
    reasons["dense_below"] = (
        f"only from {below:,} tokens on is sparse attention cheaper in every respect ({_lengths(cheaper)}), index "
        f"scores and k itself included; {past(below):.0%} of the tokens come later than that in their text"
    )
    groups = share_groups(layers, lambda source, layer: loss(k, source, layer), settings.sharing)
    reasons["groups"] = _reason_for_groups(groups, settings)
    return Advice("sparse", k, below, groups, reasons)


def share_groups(layers: int, loss: Callable[[int, int], float], limit: float) -> list[list[int]]:
    """Runs of adjacent layers, from the first on, of which none loses more than `limit` by the keys of its run's first.

    A run has at most 1 + `REACH` layers.
    """
    groups = [[0]]
    for layer in range(1, layers):
        first = groups[-1][0]
        if layer - first <= REACH and loss(first, layer) <= limit:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def _reason_for_k(k: int, measured: list[int], mass: Mapping[int, Estimate], settings: ProfileConfig) -> str:
    smaller = [other for other in measured if other < k]
    before = (
        f", the best {smaller[-1]:,} only {_share(mass[smaller[-1]])}" if smaller else ", and none smaller was tried"
    )
    low, open_end = mass[k].low, ""
    if low is None or low < settings.mass:
        open_end = "; measure more texts, since " + (
            "one has no interval" if low is None else "the interval reaches below"
        )
    return (
        f"the best {k:,} keys hold {_share(mass[k])} of the attention's mass, at least the {settings.mass:.2f} that is "
        f"asked for{before}{open_end}"
    )


def _reason_for_groups(groups: list[list[int]], settings: ProfileConfig) -> str:
    shared = sum(len(group) > 1 for group in groups)
    if not shared:
        return f"every layer loses more than {settings.sharing:.0%} of its mass by the keys of the layer before it"
    layers = sum(map(len, groups))
    return (
        f"{len(groups)} indexers serve {layers} layers if none loses more than {settings.sharing:.0%} of the mass of "
        f"its own best keys by those of its group's first layer (at most {1 + REACH} layers were tried together)"
    )


def _share(found: Estimate) -> str:
    interval = "" if found.low is None or found.high is None else f" ({found.low:.3f} to {min(1.0, found.high):.3f})"
    return f"{found.value:.3f}{interval}"


def _lengths(found: Crossover) -> str:
    parts = (
        ("a token's bytes of cache", found.token_bytes),
        ("a token's FLOPs", found.token_flops),
        ("a prompt's FLOPs", found.prompt_flops),
    )
    return ", ".join(f"{name} {'never' if length is None else f'from {length:,}'}" for name, length in parts)
