"""Five questions about sparse attention, each answered by a small experiment on the bundled models.

    python benchmarks/questions                        # all of them; on a busy machine it took 50 minutes
    python benchmarks/questions --only layers,retriever

short: whether short text loses anything. dense: which inputs want dense attention, by a rule on the figures of
`tokensieve profile`. layers: what kinds of tokens the layers select, and whether they agree. retriever: whether the
indexer finds what BM25 finds in passages of the same context. stream: text appended to a live cache against text read
anew.

Prints tables in Markdown, with 95% intervals over texts or contexts, and writes every figure as JSON. The texts are the
held-out Python that is bundled. Each question is a file beside this one.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from dense_inputs import dense
from layers import layers
from retriever import retriever
from short_text import short
from stream import stream
from subject import QUICK, Sizes, Subject

import tokensieve
from tokensieve import evals
from tokensieve.demo import bundled_texts
from tokensieve.report import environment
from tokensieve.tasks import encoder

QUESTIONS: Mapping[str, Callable[[Subject], dict[str, Any]]] = {
    "short": short,
    "dense": dense,
    "layers": layers,
    "retriever": retriever,
    "stream": stream,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(QUESTIONS), help="questions, with commas")
    parser.add_argument("--texts", type=int, default=Sizes.texts)
    parser.add_argument("--quick", action="store_true", help="a few short texts: whether it runs, not what it finds")
    parser.add_argument("--out", type=Path, default=Path("runs/questions.json"))
    options = parser.parse_args()
    asked = options.only.split(",")
    if unknown := set(asked) - set(QUESTIONS):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; choose from {', '.join(QUESTIONS)}")
    sizes = QUICK if options.quick else replace(Sizes(), texts=options.texts)
    tokenizer = tokensieve.load_tokenizer("sparse")
    encode = encoder(tokenizer)
    texts = evals.text_sequences(encode, bundled_texts(), sizes.context, sizes.texts)
    subject = Subject(tokensieve.load("base"), tokensieve.load("sparse"), encode, tokenizer, texts, sizes)
    found: dict[str, Any] = {"run": environment()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in asked:
        begin = time.perf_counter()
        found[name] = QUESTIONS[name](subject)
        print(f"\n{name}: {time.perf_counter() - begin:.0f} s", flush=True)
        options.out.write_text(json.dumps(found, indent=1, default=lambda e: e.to_dict()))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
