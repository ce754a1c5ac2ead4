"""Ways to select, on one model and the same prompts: quality beside the keys read and the indexer's work.

    python benchmarks/selections.py --model sparse --context 8192 --texts 16 --needles 8
    python benchmarks/selections.py --also distilled-4=runs/warm-4/step-000100

Prints a table in Markdown, with 95% intervals over documents and contexts, and writes every figure as JSON.
Perplexity and needles are compared with the top k of the model, prompt by prompt; `--against` names other arms for
tables of their own. `--also` adds another checkpoint, which selects its own, and `--arm` a selector on the model.
`--plain` leaves out all arms but dense attention and those added; `--budget` keeps the ways to spend a budget of keys,
too. Keys are the mean over layers and over queries that see more than k; index scores are those of a text's last query,
in units of one for every key in every layer; those of an `--arm` are not counted.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import tokensieve
from tokensieve import evals
from tokensieve.config import DataConfig, UserError
from tokensieve.data import read_documents
from tokensieve.evals import Arm, evaluation, intervals
from tokensieve.evals.trial import try_selection
from tokensieve.integers import read_integer
from tokensieve.machine import choose_device
from tokensieve.model import DecoderForCausalLM, SelectionContext
from tokensieve.model.selection import dense, indexer, name_of, resolve, window
from tokensieve.report import environment
from tokensieve.selectors import (
    DenseBelow,
    DenseIfSpread,
    DenseLayers,
    PerLayer,
    PerQuery,
    Recent,
    Shared,
    TwoLevel,
)
from tokensieve.tasks import Documents, encoder
from tokensieve.tasks.retrieval import MAX_NEEDLES, Needles


class Counting:
    """A selector that selects as another one, and counts the keys of queries that see more than k."""

    def __init__(self, selector: Callable[[SelectionContext], Tensor | None]):
        self.selector, self.keys, self.queries = selector, Counter[int](), Counter[int]()  # by layer
        self.__name__ = name_of(selector)

    def __call__(self, c: SelectionContext) -> Tensor | None:
        indices, seen = self.selector(c), c.ends_N - c.starts_N
        past = seen > c.k
        self.keys[c.layer] += int((seen if indices is None else (indices >= 0).sum(1))[past].sum())
        self.queries[c.layer] += int(past.sum())
        return indices

    @property
    def mean(self) -> float:
        return self.keys.total() / max(1, self.queries.total())

    @property
    def by_layer(self) -> list[float]:
        return [self.keys[layer] / max(1, self.queries[layer]) for layer in sorted(self.queries)]


# Each selector, and the index scores of its last query, if they can be counted.
PLAIN: dict[str, tuple[Any, float | None]] = {"dense": (dense, 0.0), "sparse": (indexer, 1.0)}


def budget_arms(model: DecoderForCausalLM, texts: list[Tensor], k: int) -> dict[str, tuple[Any, float | None]]:
    """The ways to spend a budget of k keys that are fitted to it on `texts`, as `arms_of` gives them."""
    return {
        "k by query": (PerQuery(evals.fitted_query_share(model, texts, k)), 1.0),
        "k by layer": (PerLayer(evals.fitted_k(model, texts, k)), 1.0),
    }


def arms_of(model: DecoderForCausalLM, texts: list[Tensor], k: int) -> dict[str, tuple[Any, float | None]]:
    """Each selector, fitted to a budget of k keys on `texts`, and the index scores of its last query, in units of one
    for every key in every layer.
    """
    layers, tokens, block = len(model.model.layers), len(texts[0]), 32
    blocks = 2 * k // block
    arms = budget_arms(model, texts, k) | {
        "window": (window, 0.0),
        "top k, sinks, window": (Recent(last=min(64, k // 4)), 1.0),
        "dense in layer 0": (DenseLayers((0,)), (layers - 1) / layers),
        "dense below 4 k": (DenseBelow(4 * k), 1.0),
        "dense if spread": (DenseIfSpread(0.7), 1.0),
        f"two levels, {blocks} x {block}": (TwoLevel(block, blocks), 1 / block + blocks * block / tokens),
    }
    for keep in (layers // 2, layers // 4):
        with tokensieve.selecting(model, "indexer", k):
            chosen = evals.greedy_choice(model, texts, keep)
        shared = tuple(layer for layer in range(layers) if layer not in chosen.kept)
        arms[f"{keep} indexers, kept {chosen.kept}"] = (Shared(shared), keep / layers)
        every = layers // keep
        regular = tuple(layer for layer in range(layers) if layer % every)
        arms[f"{keep} indexers, every {every}th"] = (Shared(regular), keep / layers)
    return arms


def named(option: str, texts: list[str], what: str, taken: Collection[str] = ()) -> dict[str, str]:
    """{name: value} of `NAME=value`. UserError for another form, and for a name that is taken."""
    found: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not (name and value):
            raise UserError(f"{option} {text}: write it as NAME={what}")
        if name in {*PLAIN, *taken, *found}:
            raise UserError(f"{option} {text}: there is an arm {name} already; give each its own name")
        found[name] = value
    return found


def rows_of(
    models: dict[str, DecoderForCausalLM], tokenizer: Any, sizes: argparse.Namespace, k: int
) -> list[dict[str, Any]]:
    model, encode = models["sparse"], encoder(tokenizer)
    training = list(read_documents("python", "train", DataConfig().held_out_share))
    fitted_on = evals.text_sequences(encode, training, sizes.context, sizes.fit)
    selectors = dict(PLAIN)
    if not sizes.plain:
        selectors |= (budget_arms if sizes.budget else arms_of)(model, fitted_on, k)
    for name in {*sizes.arm, *models} & ({*selectors} - {*PLAIN}):
        raise UserError(f"there is an arm {name} already; give each its own name")
    selectors |= {name: (resolve(selector), None) for name, selector in sizes.arm.items()}
    if unknown := {*sizes.against} - {*selectors, *models}:
        known = ", ".join({**selectors, **models})
        raise UserError(f"--against {', '.join(sorted(unknown))}: there is no such arm; there are {known}")
    held_out = list(read_documents("python", "test", DataConfig().held_out_share))
    sequences = evals.text_sequences(encode, held_out, sizes.context, sizes.texts)
    for name in sizes.arm:  # now rather than after the other arms
        try_selection(model, selectors[name][0], k, sequences[0])
    task = Needles(encode, Documents(test=held_out), context=sizes.context)
    needles = task.examples("test", sizes.needles * MAX_NEEDLES)
    places = evaluation.by_context(needles)
    contexts = [number for number, group in enumerate(places) for _ in group]
    counting = {name: Counting(selector) for name, (selector, _) in selectors.items()}
    arms = {name: Arm(model, counted) for name, counted in counting.items()}
    work = {name: share for name, (_, share) in selectors.items()}
    for name, other in models.items():
        if name != "sparse":
            counting[name] = Counting(indexer)
            arms[name] = Arm(other, counting[name])
            work[name] = other.model.indexers / len(other.model.layers)
    scores = evals.compare(arms, encode, sequences, task, needles, k)
    return [
        {
            "arm": name, "k": k, "selector": repr(counting[name].selector), "losses": found.text.by_text,
            "answers": [record.score.value for record in found.needles.records] if found.needles else [],
            "documents": list(sequences.documents), "contexts": contexts,
            "keys": counting[name].mean, "keys_by_layer": counting[name].by_layer, "scores": work[name],
        }
        for name, found in scores.items()
    ]  # fmt: skip


def line(row: dict[str, Any], base: dict[str, Any]) -> str:
    """A row of the table, whose arm is compared with another one."""
    ratio = intervals.ratio([a - b for a, b in zip(row["losses"], base["losses"], strict=True)], row["documents"])
    bounds = "" if ratio.low is None else f" ({ratio.low:.4f} to {ratio.high:.4f})"
    ppl = "1" if row is base else f"{ratio.value:.4f}{bounds}"
    needle = f"{fmean(row['answers']):.1%}" if row["answers"] else ""
    if row is not base and row["answers"]:
        apart = intervals.clustered_difference(row["answers"], base["answers"], row["contexts"])
        bounds = "" if apart.low is None else f": {100 * apart.low:+.1f} to {100 * apart.high:+.1f}"
        needle += f" ({100 * apart.value:+.1f}{bounds})"
    scores = "" if row["scores"] is None else f"{row['scores']:.2f}"
    return f"| {row['arm']} | {ppl} | {needle} | {row['keys']:.0f} | {scores} |"


def budgets(text: str) -> list[int]:
    """Numbers of keys with commas between them."""
    try:
        numbers = [read_integer(part) for part in text.split(",") if part]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; give whole numbers, for example 128,512") from error
    if min(numbers, default=1) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give at least 1 key")
    return numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="sparse")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--arm", action="append", default=[], metavar="NAME=SELECTOR")
    parser.add_argument("--against", action="append", default=[], metavar="ARM")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--budget", action="store_true")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--texts", type=int, default=16, help="held-out texts")
    parser.add_argument("--needles", type=int, default=8, help="contexts with 16 needles each")
    parser.add_argument("--fit", type=int, default=4, help="training texts that budgets and layers are fitted on")
    parser.add_argument(
        "--top-k", type=budgets, default="", help="budgets in keys, with commas; the model's own unless given"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/selections.json"))
    sizes = parser.parse_args()
    try:
        measure(sizes)
    except UserError as error:
        print(f"selections: {error}", file=sys.stderr)
        return 2
    return 0


def measure(sizes: argparse.Namespace) -> None:
    """Prints and writes the tables of all budgets. UserError for what cannot be measured."""
    sizes.arm = named("--arm", sizes.arm, "SELECTOR")
    device = choose_device(sizes.device)
    models = {"sparse": tokensieve.load(sizes.model, device=device)}
    for name, folder in named("--also", sizes.also, "FOLDER", sizes.arm).items():
        models[name] = tokensieve.load(folder, device=device)
    tokenizer = tokensieve.load_tokenizer(sizes.model)
    rows: list[dict[str, Any]] = []
    for k in sizes.top_k or [models["sparse"].top_k]:
        found = rows_of(models, tokenizer, sizes, k)
        print(f"\nk = {k}, {sizes.context} tokens, {sizes.texts} texts, {sizes.needles * MAX_NEEDLES} questions\n")
        for base in (row for row in found if row["arm"] in ("sparse", *sizes.against)):
            print(f"| selection | perplexity / {base['arm']} | needles (less {base['arm']}) | keys | index scores |")
            print("|---|---|---|---|---|")
            print("\n".join(line(row, base) for row in found) + "\n", flush=True)
        rows += found
        sizes.out.parent.mkdir(parents=True, exist_ok=True)
        sizes.out.write_text(json.dumps({"rows": rows, "run": environment()}, indent=1))


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
