"""The income and the cost of an API's price list on a user's own traffic.

A prompt's tokens that a cache holds cost no GPU time here: where such a cache lies, on disk as a rule, is not priced.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tokensieve.config import UserError

STRETCHES = 512  # straight pieces that a cost's curve over positions is cut into
KINDS = ("dense", "sparse")
PHASES = {"input": "prefill", "output": "decode"}
MOST = 1 << 40  # tokens of one request; more are a mistake, and floating-point sums would lose single ones
LONGEST = 1 << 17  # tokens up to which the position is looked for at which costs have fallen as far as prices


@dataclass(frozen=True)
class PriceList:
    """Prices of an API, in dollars per million tokens, and the attention of the model behind it."""

    name: str
    attention: Literal["dense", "sparse"]
    input_cached: float  # tokens of a prompt that a cache held
    input: float  # the other tokens of a prompt
    output: float

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UserError("a price list has an empty name; give it one")
        for name in ("input_cached", "input", "output"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"price list {self.name!r}: {name} is {getattr(self, name)}; give dollars, at least 0")


@dataclass(frozen=True)
class PricesConfig:
    """`tokensieve cost --prices`: one or more lists, each paid for the same traffic."""

    lists: tuple[PriceList, ...]

    def __post_init__(self) -> None:
        if not self.lists:
            raise UserError("no price list; write one as [[lists]]")
        names = [one.name for one in self.lists]
        for name in {name for name in names if names.count(name) > 1}:
            raise UserError(f"two price lists are called {name!r}; rename one")


@dataclass(frozen=True)
class Request:
    """Tokens of one request: of its prompt, how many of these a cache held, and of its answer."""

    prompt: int
    cached: int
    output: int


def read_traffic(path: str | Path) -> list[Request]:
    """The requests of a JSONL file: one `usage` object of OpenAI's API a line, or an answer that holds one.

    `prompt_tokens` and `completion_tokens` are required. Cached tokens are `prompt_tokens_details.cached_tokens`, or
    DeepSeek's `prompt_cache_hit_tokens`; without either none is cached. Raises UserError, naming the line, for anything
    else, and for a file without requests.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"traffic {path}: cannot be read ({error}); give a JSONL file of usage objects") from error
    found = [_request(line, f"traffic {path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"traffic {path}: no requests; give one usage object a line")
    if not any(request.prompt or request.output for request in found):
        raise UserError(f"traffic {path}: its {len(found)} requests have no tokens; give those that were paid for")
    return found


def _request(line: str, where: str) -> Request:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); give one usage object a line") from error
    usage = row.get("usage", row) if isinstance(row, dict) else None
    if not isinstance(usage, dict):
        raise UserError(f"{where}: not an object; give a usage object, or an answer that holds one")
    details = usage.get("prompt_tokens_details")
    if details is not None and not isinstance(details, dict):
        raise UserError(f"{where}: prompt_tokens_details is no object; give one with cached_tokens, or leave it out")
    cached = (details or {}).get("cached_tokens")
    if cached is None:
        cached = usage.get("prompt_cache_hit_tokens", 0)
    prompt = _tokens(usage.get("prompt_tokens"), f"{where}: prompt_tokens")
    output = _tokens(usage.get("completion_tokens"), f"{where}: completion_tokens")
    if _tokens(cached, f"{where}: cached tokens") > prompt:
        raise UserError(f"{where}: {cached} cached tokens are more than the {prompt} of the prompt; correct the line")
    return Request(prompt, cached, output)


def _tokens(count: Any, what: str) -> int:
    if type(count) is not int or not 0 <= count <= MOST:
        raise UserError(f"{what} is {json.dumps(count)[:50]}; it must be a number of tokens, at most {MOST:,}")
    return count


def mean_context(traffic: Sequence[Request]) -> int:
    """Tokens that an output token sees, in the mean over all output tokens; those of the prompts if there are none."""
    outputs = sum(r.output for r in traffic)
    if not outputs:
        return max(1, round(sum(r.prompt for r in traffic) / len(traffic)))
    return max(1, round(sum(r.output * (r.prompt + (r.output + 1) / 2) for r in traffic) / outputs))


class Curve:
    """Dollars of all tokens up to a position, from a function that gives dollars per million tokens at a position.

    Between `STRETCHES` equal pieces of the positions below `longest` the dollars per token are taken as straight lines.
    """

    def __init__(self, usd_per_million: Callable[[int], float], longest: int) -> None:
        self.positions = np.unique(np.linspace(0, max(1, longest), STRETCHES + 1).round().astype(int))
        usd = np.array([usd_per_million(int(p)) for p in self.positions]) / 1e6
        pieces = np.diff(self.positions) * (usd[1:] + usd[:-1]) / 2
        self.total = np.concatenate([[0.0], np.cumsum(pieces)])

    def between(self, begin: int, end: int) -> float:
        """Dollars of the tokens at positions begin ... end - 1."""
        low, high = np.interp([begin, end], self.positions, self.total)
        return float(high - low)


def balance(prices: PriceList, traffic: Sequence[Request], prefill: Curve, decode: Curve) -> dict[str, Any]:
    """{"input", "output", "together": {"tokens", "income", "cost", "margin"}} of one price list, in dollars.

    "margin" is what is left of the income, as a share of it; None without income. "cached": the share of prompt tokens
    that a cache held.
    """
    cached = sum(r.cached for r in traffic)
    prompt, output = sum(r.prompt for r in traffic), sum(r.output for r in traffic)
    parts = {
        "input": (
            prompt,
            (cached * prices.input_cached + (prompt - cached) * prices.input) / 1e6,
            sum(prefill.between(r.cached, r.prompt) for r in traffic),
        ),
        "output": (
            output,
            output * prices.output / 1e6,
            sum(decode.between(r.prompt, r.prompt + r.output) for r in traffic),
        ),
    }
    both = zip(*parts.values(), strict=True)
    tokens, income, cost = (sum(pair) for pair in both)
    rows = {**parts, "together": (tokens, income, cost)}
    named = {
        name: {"tokens": t, "income": i, "cost": c, "margin": (i - c) / i if i else None}
        for name, (t, i, c) in rows.items()
    }
    return {"name": prices.name, "attention": prices.attention, "cached": cached / prompt if prompt else 0.0, **named}


def compare(lists: Sequence[PriceList], traffic: Sequence[Request], usd: Callable[[str, int], float]) -> dict[str, Any]:
    """{"requests", "mean_context", "lists": the `balance` of each, "cut"} of price lists on the same traffic.

    usd: dollars per million tokens of "prefill_dense", "prefill_sparse", "decode_dense" or "decode_sparse" at a
    position. "cut" compares the first list of a dense model with the first of a sparse one: {"from", "to", "input",
    "output": {"price", "cost": after as a share of before, "position": that of `falls_to`}}. It is None without two
    such lists, or if a price before is 0.
    """
    longest = max(r.prompt + r.output for r in traffic)
    found = []
    for prices in lists:
        prefill, decode = (
            Curve(partial(usd, f"{phase}_{prices.attention}"), longest) for phase in ("prefill", "decode")
        )
        found.append(balance(prices, traffic, prefill, decode))
    first = {kind: next((i for i, prices in enumerate(lists) if prices.attention == kind), None) for kind in KINDS}
    cut = None
    if first["dense"] is not None and first["sparse"] is not None:
        pair = first["dense"], first["sparse"]
        cut = _cut([lists[i] for i in pair], [found[i] for i in pair], usd)
    return {"requests": len(traffic), "mean_context": mean_context(traffic), "lists": found, "cut": cut}


def _cut(
    lists: Sequence[PriceList], found: Sequence[dict[str, Any]], usd: Callable[[str, int], float]
) -> dict[str, Any] | None:
    before, after = lists
    if not before.input or not before.output:
        return None
    shares = {"input": after.input / before.input, "output": after.output / before.output}
    parts = {
        name: {
            "price": share,
            "cost": found[1][name]["cost"] / found[0][name]["cost"] if found[0][name]["cost"] else None,
            "position": falls_to(share, partial(usd, f"{PHASES[name]}_dense"), partial(usd, f"{PHASES[name]}_sparse")),
        }
        for name, share in shares.items()
    }
    return {"from": before.name, "to": after.name, **parts}


def falls_to(share: float, dense: Callable[[int], float], sparse: Callable[[int], float]) -> int | None:
    """The first position, in steps of 1024 tokens, at which sparse costs at most `share` of dense.

    None if there is none up to `LONGEST`.
    """
    return next((p for p in range(0, LONGEST + 1, 1024) if sparse(p) <= share * dense(p)), None)
