"""Dense and sparse attention of one model on an application: quality, time, memory, and which to take.

An example hands its parts to `main`: cases, and an attempt at a case, which a `Reader` of each arm makes. A third
reader, the control, is dense too but does not see the text. If dense attention is no better than the control, the part
is not measurable with this model. Time is the mean of an attempt, prompts included. Memory is counted, not measured:
what the cache holds for the longest prompt, and what one more token reads of it. Intervals are of 95%, over cases.

    python examples/manual.py                                     # the bundled sparse model
    python examples/manual.py --model smollm2 --top-k 256         # made sparse from its attention, and not trained
    python examples/manual.py --url http://127.0.0.1:8000/v1      # the first model there, and its name with :dense
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import tokensieve
from tokensieve import cost
from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Output, Request, Sampling
from tokensieve.evals import intervals
from tokensieve.evals.endpoint import Endpoint, Refused
from tokensieve.machine import choose_device
from tokensieve.tasks import encoder
from tokensieve.tasks.phrasing import draw_keys, draw_value

DOCS = Path(__file__).resolve().parents[1] / "docs"


class Local:
    """A model of this machine. A dense one is made sparse from its own attention, with `top_k` keys."""

    def __init__(self, name: str, top_k: int):
        model, tokenizer = tokensieve.load(name, device=choose_device("auto")), tokensieve.load_tokenizer(name)
        self.encode, self.seen = encoder(tokenizer), 0
        if not model.is_sparse:
            rows = torch.tensor([self.encode(pages()[0].text)[:4096]])
            model = tokensieve.sparsify(model, top_k or 512, 8, 64, init="attention", calibration=rows)
        self.top_k = top_k or model.top_k
        self.shape = cost.shape_of(model.config)
        self.layout: cost.Layout = "float32" if model.dtype == torch.float32 else "bf16"
        self.engine = Engine(model, tokenizer, EngineConfig(running=2, top_k=top_k))

    def fit(self, text: str, tokens: int) -> str:
        return self.encode.decode(self.encode(text)[:tokens])

    def _run(self, arm: str, prompt: list[int], **sampling: Any) -> list[Output]:
        self.engine.add(Request("1", tuple(prompt), Sampling(**sampling), "dense" if arm == "dense" else "indexer"))
        outputs = []
        while self.engine.busy:
            outputs += self.engine.step()
        if outputs[-1].error:
            raise UserError(outputs[-1].error)
        self.seen = max(self.seen, outputs[-1].prompt_tokens)
        return outputs

    def answer(self, arm: str, message: str, tokens: int) -> str:
        prompt = self.encode.prompt([{"role": "user", "content": message}])
        return "".join(output.text for output in self._run(arm, prompt, max_tokens=tokens))

    def nats(self, arm: str, text: str, ending: str) -> float:
        end = self.encode(ending)
        outputs = self._run(arm, [*self.encode.prompt(text), *end], max_tokens=0, prompt_logprobs=0)
        return fmean(one.logprob for one in outputs[0].prompt_logprobs[-len(end) :] if one is not None)

    def memory(self, arm: str) -> tuple[int, int]:
        """Bytes that the cache holds for the longest prompt so far, and that one more token reads of it."""
        index = self.shape.index_layers * cost.index_bytes(self.shape, self.layout)
        held = cost.cache_bytes_per_token(self.shape, self.layout) - (index if arm == "dense" else 0)
        return held * self.seen, cost.decode_cache_bytes(self.shape, self.seen, self.layout, sparse=arm == "sparse")


class Remote:
    """Two models of an OpenAI-compatible endpoint: a sparse one and its dense form."""

    def __init__(self, url: str, sparse: str, dense: str, top_k: int):
        self.endpoint, self.seen, self.top_k = Endpoint(url, os.environ.get("OPENAI_API_KEY", "none")), 0, top_k
        served = {card["id"]: card for card in self.endpoint.models()}
        sparse = sparse or next(iter(served), "")
        self.names = {"sparse": sparse, "dense": dense or f"{sparse}:dense"}
        for arm, name in self.names.items():
            if name not in served:
                raise UserError(
                    f"{url} does not serve {name!r} ({', '.join(served)}); name the {arm} model with --{arm}"
                )
        self.top_k = top_k or int(served[sparse].get("index_topk") or 0)

    def fit(self, text: str, tokens: int) -> str:
        return text[: 3 * tokens]  # the endpoint's tokenizer is not known

    def answer(self, arm: str, message: str, tokens: int) -> str:
        reply = self.endpoint.chat(self.names[arm], message, tokens)
        self.seen = max(self.seen, reply.prompt_tokens)
        return reply.text

    def nats(self, arm: str, text: str, ending: str) -> float:
        reply = self.endpoint.score(self.names[arm], text + ending)
        self.seen, found, length = max(self.seen, reply.prompt_tokens), [], 0
        for token, logprob in reversed(list(zip(reply.tokens, reply.logprobs))[: reply.prompt_tokens]):
            if length < len(ending) and logprob is not None:
                found.append(logprob)
            length += len(token)
        return fmean(found)

    def memory(self, arm: str) -> None:
        return None


@dataclass(frozen=True)
class Reader:
    """One arm. blind: the control, which is not shown the text."""

    model: Local | Remote
    arm: str
    blind: bool = False

    def ask(self, text: str, question: str, tokens: int = 24) -> str:
        """The greedy answer to a question behind a text."""
        return self.model.answer(self.arm, question if self.blind else f"{text}\n\n{question}", tokens)

    def nats(self, text: str, beginning: str, ending: str) -> float:
        """The mean log probability of an ending's tokens, behind a text and the beginning."""
        return self.model.nats(self.arm, beginning if self.blind else f"{text}\n\n{beginning}", ending)


@dataclass(frozen=True)
class Part:
    """A part of an application.

    cases: a function of the model, the tokens of a text, the number of cases, and a generator of random numbers.
    attempt: a reader's score for a case; more is better. unit: "right" for scores of 0 or 1, or "nats".
    """

    name: str
    cases: Callable[[Any, int, int, random.Random], Sequence[Any]]
    attempt: Callable[[Reader, Any], float]
    unit: str = "right"


@dataclass(frozen=True)
class Page:
    name: str
    text: str


def pages() -> list[Page]:
    """The documentation of this project, as real text: training.md first, the longest manual."""
    paths = sorted(DOCS.rglob("*.md"), key=lambda path: (path.name != "training.md", str(path)))
    return [Page(path.stem, path.read_text(encoding="utf-8")) for path in paths]


def hide(text: str, lines: Sequence[str], rng: random.Random) -> str:
    """The text with the lines between its own, at random places in their order."""
    rows = text.splitlines()
    places = sorted(rng.choices(range(1, len(rows) + 1), k=len(lines)), reverse=True)
    for place, line in zip(places, reversed(lines), strict=True):
        rows.insert(place, line)
    return "\n".join(rows)


@dataclass(frozen=True)
class Case:
    """A text, a question or a beginning, and the right answer or the ending."""

    text: str
    question: str
    answer: str


def answered(reader: Reader, case: Case) -> float:
    return float(case.answer in reader.ask(case.text, case.question))


def continued(reader: Reader, case: Case) -> float:
    return reader.nats(case.text, case.question, case.answer)


def names(rng: random.Random, count: int) -> list[str]:
    """Names such as "amber-falcon", none of which training has seen."""
    return ["-".join(key.words) for key in draw_keys(rng, count, held_out=True)]


def number(rng: random.Random) -> str:
    return draw_value(rng, held_out=True)


def judge(part: Part, scores: dict[str, list[float]], seconds: dict[str, list[float]], short: bool) -> str:
    """Which arm to take, in a sentence."""
    apart = intervals.difference if part.unit == "right" else _mean_apart
    gained, lost = apart(scores["dense"], scores["control"]), apart(scores["sparse"], scores["dense"])
    if gained.low is None or gained.low <= 0:
        return "not measurable with this model: dense attention is not better with the text than without it"
    assert lost.low is not None and lost.high is not None
    times = sum(seconds["sparse"]) / sum(seconds["dense"])
    found = (
        f"sparse - dense {lost.value:+.3f} ({lost.low:+.3f} to {lost.high:+.3f}) {part.unit}, {times:.2f} of the time"
    )
    if short:
        return f"{found}. Take dense: the text is not longer than k, so both are the same"
    if lost.high < 0:
        return f"{found}. Take dense: sparse attention loses here"
    if times >= 1:
        return f"{found}. Take dense: sparse attention saves no time at this length"
    return (
        f"{found}. Take sparse, if a loss of {max(0.0, -lost.low):.3f} {part.unit}, which is not excluded, is bearable"
    )


def _mean_apart(a: Sequence[float], b: Sequence[float]) -> intervals.Estimate:
    return intervals.mean([x - y for x, y in zip(a, b, strict=True)])


def compare(part: Part, model: Local | Remote, tokens: int, count: int, seed: int) -> None:
    """Makes every attempt with every reader, in turn, and prints a row for each and the verdict."""
    model.seen = 0
    readers = {"dense": Reader(model, "dense"), "sparse": Reader(model, "sparse")}
    readers["control"] = Reader(model, "dense", blind=True)
    scores: dict[str, list[float]] = {name: [] for name in readers}
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for case in part.cases(model, tokens, count, random.Random(seed)):
        for name, reader in readers.items():
            begin = time.perf_counter()
            scores[name].append(part.attempt(reader, case))
            seconds[name].append(time.perf_counter() - begin)
    print(
        f"{part.name}: {len(scores['dense'])} cases, prompts of up to {model.seen:,} tokens, k = {model.top_k or '?'}"
    )
    for name in readers:
        bytes_ = model.memory(name) if name != "control" else None
        memory = f"{bytes_[0] / 2**20:7.1f} MiB held {bytes_[1] / 2**20:6.2f} MiB read" if bytes_ else ""
        share = intervals.share(sum(scores[name]), len(scores[name])) if part.unit == "right" else None
        shown = f"{share.value:7.1%} ({share.low:.0%} to {share.high:.0%})" if share else f"{fmean(scores[name]):7.3f}"
        print(f"  {name:<8} {shown:<22} {part.unit:<6} {fmean(seconds[name]):6.2f} s {memory}")
    print("  " + judge(part, scores, seconds, 0 < model.seen <= model.top_k) + "\n")


def main(about: str, *parts: Part) -> None:
    """Runs the parts of an example as its command says. Exits with 2, and one line, if something cannot work."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sparse", help="a model of this machine: sparse, base, smollm2, a folder")
    parser.add_argument("--url", help="an OpenAI-compatible endpoint, with its /v1, instead of --model")
    parser.add_argument("--sparse", default="", help="the endpoint's sparse model, else the first that it lists")
    parser.add_argument("--dense", default="", help="its dense form, else the sparse one's name with :dense")
    parser.add_argument(
        "--top-k", type=int, default=0, help="keys per query; 0: the model's own, and 512 for a dense one"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of a text")
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        model = Remote(args.url, args.sparse, args.dense, args.top_k) if args.url else Local(args.model, args.top_k)
        for part in parts:
            compare(part, model, args.tokens, args.cases, args.seed)
    except (UserError, Refused) as error:
        sys.exit(_failed(parser.prog, error))


def _failed(program: str, error: Exception) -> int:
    print(f"{program}: error: {error}", file=sys.stderr)
    return 2
