"""Sparse beside dense at long contexts: quality at 64K and 128K tokens, and speed to 256K, of the same two models.

    python benchmarks/long_context.py --dense runs/dense-128k/step-000020 --sparse runs/adapt-128k/step-000020
    python benchmarks/long_context.py --quick

Both models read the same held-out texts and are asked for the same needles. Few modules are that long: a text is
held-out Python in the order of the modules' names, so that those of one package stand together. Perplexity is that of
the tokens that see more than k keys. Intervals are of 95%, paired text by text and question by question; recall is that
of the indexer.

Speed is the engine's (`tokensieve.bench`): seconds to the first token of one prompt, and milliseconds a token of one
sequence and of several, after a cache full of noise. Past the models' positions there is speed alone.

Each figure is written to --out as soon as it is there. The same command goes on after the last one.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokensieve
from tokensieve import checkpoint, evals
from tokensieve.bench import Workload, serve_load
from tokensieve.config import DataConfig, UserError
from tokensieve.data import read_documents
from tokensieve.data.store import encoded
from tokensieve.evals import Arm
from tokensieve.families import model_config
from tokensieve.files import write_json
from tokensieve.machine import choose_device
from tokensieve.model import DecoderForCausalLM, model_path
from tokensieve.report.origin import environment
from tokensieve.tasks import Document, Documents, PlainEncoder, encoder
from tokensieve.tasks.retrieval import MAX_NEEDLES, Needles

ROOT = Path(__file__).resolve().parents[1]
ARMS = {"dense": "dense", "sparse": "indexer"}  # the selection of each
NEW = 32  # tokens of a timed answer
RECALL_TEXTS = 2

Figures = dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", default="runs/dense-128k/step-000020")
    parser.add_argument("--sparse", default="runs/adapt-128k/step-000020")
    parser.add_argument("--contexts", type=int, nargs="+", default=[65536, 131072], help="of quality, in tokens")
    parser.add_argument("--speed", type=int, nargs="*", default=[65536, 131072, 262144], help="of speed, in tokens")
    parser.add_argument("--texts", type=int, default=8, help="at most; fewer if the held-out text is shorter")
    parser.add_argument("--needles", type=int, default=8, help=f"contexts with {MAX_NEEDLES} needles each")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16], help="that decode together")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a prompt that the engine runs at once")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="the bundled models, in contexts that are none")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "long_context.json")
    asked = parser.parse_args()
    if asked.quick:
        asked.dense, asked.sparse, asked.contexts, asked.speed = "base", "sparse", [768], [768, 1024]
        asked.texts, asked.needles, asked.sequences, asked.chunk = 2, 2, [1, 2], 512
    return asked


def long_texts(encode: PlainEncoder, documents: list[Document], context: int, count: int) -> list[Tensor]:
    """Up to `count` sequences (context,) int64: the documents in their order, joined and cut.

    Raises:
        UserError: the documents hold less than one.
    """
    length = context - len(encode.begin)
    tokens = chain.from_iterable(ids.tolist() for _, ids in encoded(documents, encode))
    ids = list(islice(tokens, count * length))
    begins = range(0, len(ids) - length + 1, length)
    if not begins:
        raise UserError(f"the held-out text has {len(ids)} tokens, not {length}; ask for shorter --contexts")
    return [torch.tensor([*encode.begin, *ids[a : a + length]]) for a in begins]


def quality(
    models: dict[str, DecoderForCausalLM],
    encode: PlainEncoder,
    documents: list[Document],
    context: int,
    asked: argparse.Namespace,
) -> Figures:
    """{"dense", "sparse": {"ppl", "needle", ...}, "compared", "recall", "texts", "questions"} in one context."""
    texts = long_texts(encode, documents, context, asked.texts)
    task = Needles(encode, Documents(test=documents), context=context)
    needles = task.examples("test", asked.needles * MAX_NEEDLES)
    arms = {name: Arm(models[name], selection) for name, selection in ARMS.items()}
    scores = evals.compare(arms, encode, texts, task, needles, models["sparse"].top_k)
    held = evals.recall(models["sparse"], texts[:RECALL_TEXTS], queries=128)
    found = {"recall": held.overall, "by_layer": held.by_layer, "texts": len(texts), "questions": len(needles)}
    return evals.metrics_of(scores) | found


def extended(folder: str, positions: int, device: torch.device) -> DecoderForCausalLM:
    """The model, told that it knows so many positions. It does not: what it then says is only good to be timed."""
    fields = checkpoint.read_config(model_path(folder))
    longest = max(positions, fields["max_position_embeddings"])
    return tokensieve.load(folder, device=device, config=model_config(fields | {"max_position_embeddings": longest}))


def speed(
    model: DecoderForCausalLM, tokenizer: Any, selection: str, context: int, ids: list[int], asked: argparse.Namespace
) -> Figures:
    """{"prefill_seconds", "token_ms": {sequences: ms}, "memory_bytes": at the peak} after `context` tokens."""
    prompt = tuple((ids * (context // len(ids) + 1))[:context])
    load = Workload(1, context, new=2, selection=selection, chunk=asked.chunk)
    read = serve_load(model, tokenizer, load, [prompt])
    decoded = {
        str(count): serve_load(
            model, tokenizer, Workload(count, context, NEW, selection, filled=True, chunk=asked.chunk), [prompt] * count
        )
        for count in asked.sequences
    }
    return {
        "prefill_seconds": read.first_p50,
        "token_ms": {count: 1000 * served.next_p50 for count, served in decoded.items()},
        "memory_bytes": max(served.memory_bytes for served in (read, *decoded.values())),
    }


def table(figures: Figures, asked: argparse.Namespace) -> str:
    """All of it in Markdown, a context a row."""
    together = [f"ms a token, {count} at once" for count in asked.sequences]
    names = ["tokens", "perplexity, dense", "sparse / dense", "needles, dense", "sparse - dense, points", "recall"]
    names += ["prefill s: dense, sparse", *(f"{what}: dense, sparse" for what in together)]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for context in sorted({*asked.contexts, *asked.speed}):
        cells = [f"{context:,}", *quality_cells(figures["quality"].get(str(context)))]
        timed = [figures["speed"].get(f"{name} {context}") for name in ARMS]
        cells.append(pair(found and found["prefill_seconds"] for found in timed))
        cells += [pair(found and found["token_ms"][str(count)] for found in timed) for count in asked.sequences]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def quality_cells(found: Figures | None) -> list[str]:
    if found is None:
        return [""] * 5
    ratio, difference = found["compared"]["ppl"]["dense"], found["compared"]["needle"]["dense"]
    return [
        f"{found['dense']['ppl']:.3f}",
        estimate(ratio, 1, 4) + f", {found['texts']} texts",
        f"{found['dense']['needle']:.1%} of {found['questions']}",
        estimate(difference, 100, 1),
        f"{found['recall']:.3f}",
    ]


def estimate(found: Figures, factor: float, digits: int) -> str:
    if found["low"] is None:
        return f"{factor * found['value']:.{digits}f}"
    value, low, high = (factor * found[name] for name in ("value", "low", "high"))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def pair(values: Any) -> str:
    return ", ".join("" if value is None else f"{value:.2f}" for value in values).strip(", ")


def resumed(asked: argparse.Namespace) -> Figures:
    """What --out holds of the same measurement, or nothing yet.

    Raises:
        UserError: it holds another one.
    """
    settings = {name: str(value) for name, value in vars(asked).items() if name != "out"}
    if not asked.out.exists():
        return {"asked": settings, "quality": {}, "speed": {}, "seconds": {}, "run": environment()}
    figures: Figures = json.loads(asked.out.read_text(encoding="utf-8"))
    if figures.get("asked") != settings:
        raise UserError(f"{asked.out} holds figures of other settings; name another file with --out")
    return figures


def measure(asked: argparse.Namespace) -> Figures:
    figures, device = resumed(asked), torch.device(choose_device(asked.device))
    folders = {"dense": asked.dense, "sparse": asked.sparse}
    tokenizer = tokensieve.load_tokenizer(asked.sparse)
    encode = encoder(tokenizer)
    documents = list(read_documents("python", "test", DataConfig().held_out_share))

    def keep(part: str, key: str, run: Callable[[], Figures]) -> None:
        if key in figures[part]:
            return
        begin = time.perf_counter()
        figures[part][key] = run()
        figures["seconds"][f"{part} {key}"] = time.perf_counter() - begin
        write_json(asked.out, figures)
        print(f"{part} {key}: {figures['seconds'][f'{part} {key}']:.0f} s", file=sys.stderr)

    models = {name: tokensieve.load(folder, device=device) for name, folder in folders.items()}
    for context in asked.contexts:
        keep("quality", str(context), lambda context=context: quality(models, encode, documents, context, asked))
    longest = max([*asked.speed, 0]) + NEW + 1
    models = {name: extended(folder, longest, device) for name, folder in folders.items()}
    ids = long_texts(encode, documents, min(asked.contexts), 1)[0].tolist()
    for context in asked.speed:
        for name, selection in ARMS.items():
            cell = (models[name], tokenizer, selection, context, ids, asked)
            keep("speed", f"{name} {context}", lambda cell=cell: speed(*cell))
    return figures


def main() -> int:
    asked = arguments()
    try:
        figures = measure(asked)
    except UserError as error:
        print(f"long_context: {error}", file=sys.stderr)
        return 2
    print(table(figures, asked))
    print(f"\nFigures: {asked.out}; {sum(figures['seconds'].values()):.0f} s without loading")
    return 0


if __name__ == "__main__":
    sys.exit(main())
