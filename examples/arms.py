"""Dense and sparse attention of one model on an application: quality, time, memory, and which to take.

An example hands its parts to `main`: cases, and an attempt at a case, which a `Reader` of each arm makes. A third
reader, the control, is dense too but does not see the text. If dense attention is no better than the control, the part
is not measurable with this model. Time is the mean of an attempt, prompts included; on a GPU each arm first makes the
first attempt once more, which is not timed, since kernels are compiled in it. Memory is counted: what the cache holds
for the longest prompt, and what one more token reads of it. On a GPU the peak of an attempt is measured too, with the
weights and the pages, which both arms share. Intervals are of 95%, over cases; cases about the same page or file may
err together, and count as one cluster.

    python examples/manual.py                                     # the bundled sparse model
    python examples/manual.py --model smollm2 --top-k 256         # made sparse from its attention, and not trained
    python examples/manual.py --device cuda --tokens 16384 --out runs/manual.json
    python examples/manual.py --url http://127.0.0.1:8000/v1      # the first model there, and its name with :dense
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track

import tokensieve
from tokensieve import cost
from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Output, Request, Sampling
from tokensieve.evals import intervals
from tokensieve.evals.endpoint import Endpoint, Refused
from tokensieve.files import write_json
from tokensieve.machine import choose_device
from tokensieve.report.origin import environment
from tokensieve.tasks import encoder
from tokensieve.tasks.phrasing import draw_keys, draw_value

DOCS = Path(__file__).resolve().parents[1] / "docs"
LEAST = 64  # tokens of a text
AROUND = 1024  # tokens of questions, what is hidden and what is answered, at most: a half of them for a beginning
CHARACTERS = 3  # of a token, in an endpoint's tokenizer, which is not known
LONG = 8  # characters of a token, more than any text has in the mean


class Local:
    """A model of this machine. A dense one is made sparse from its own attention, with `top_k` keys."""

    def __init__(self, name: str, top_k: int, device: str = "auto"):
        model, tokenizer = tokensieve.load(name, device=choose_device(device)), tokensieve.load_tokenizer(name)
        self.encode, self.seen = encoder(tokenizer), 0
        self.gpu = model.device if model.device.type == "cuda" else None
        if not model.is_sparse:
            rows = torch.tensor([self.encode(pages()[0].text)[:4096]])
            model = tokensieve.sparsify(model, top_k or 512, 8, 64, init="attention", calibration=rows)
        self.top_k = top_k or model.top_k
        self.shape = cost.shape_of(model.config)
        self.layout: cost.Layout = "float32" if model.dtype == torch.float32 else "bf16"
        self.engine = Engine(model, tokenizer, EngineConfig(running=2, top_k=top_k))

    def check(self, tokens: int) -> None:
        """UserError if texts of so many tokens, with questions and answers, are more than the model has room for."""
        room = self.engine.longest - AROUND
        if tokens > room:
            raise UserError(f"--tokens {tokens}: this model has room for {room}; ask for as many or fewer")

    def size(self, text: str) -> int:
        return len(self.encode(text))

    def fit(self, text: str, tokens: int, end: bool = False) -> str:
        """The first tokens of a text, or with `end` the last. Fewer if they have more than `LONG` characters each."""
        ids = self.encode(text[-LONG * tokens :] if end else text[: LONG * tokens])
        return self.encode.decode(ids[-tokens:] if end else ids[:tokens])

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

    gpu: torch.device | None = None  # of this machine

    def __init__(self, url: str, sparse: str, dense: str, top_k: int):
        self.endpoint, self.seen = Endpoint(url, os.environ.get("OPENAI_API_KEY", "none")), 0
        served = {card["id"]: card for card in self.endpoint.models()}
        sparse = sparse or next(iter(served), "")
        self.names = {"sparse": sparse, "dense": dense or f"{sparse}:dense"}
        for arm, name in self.names.items():
            if name not in served:
                raise UserError(
                    f"{url} does not serve {name!r} ({', '.join(served)}); name the {arm} model with --{arm}"
                )
        self.top_k = top_k or int(served[sparse].get("index_topk") or 0)
        self.positions = int(served[sparse].get("max_model_len") or 0)

    def check(self, tokens: int) -> None:
        """As of `Local`, if the endpoint lists its model's positions."""
        room = self.positions - AROUND
        if self.positions and tokens > room:
            raise UserError(f"--tokens {tokens}: {self.names['sparse']} has room for {room}; ask for as many or fewer")

    def size(self, text: str) -> int:
        return len(text) // CHARACTERS

    def fit(self, text: str, tokens: int, end: bool = False) -> str:
        return text[-CHARACTERS * tokens :] if end else text[: CHARACTERS * tokens]

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
    """One arm. blind: the control, which is not shown the text. before: what stands before all that is shown."""

    model: Local | Remote
    arm: str
    blind: bool = False
    before: str = ""

    def ask(self, text: str, question: str, tokens: int = 24) -> str:
        """The greedy answer to a question behind a text."""
        return self.model.answer(self.arm, self._shown(text, question), tokens)

    def nats(self, text: str, beginning: str, ending: str) -> float:
        """The mean log probability of an ending's tokens, behind a text and the beginning."""
        return self.model.nats(self.arm, self._shown(text, beginning), ending)

    def _shown(self, text: str, then: str) -> str:
        return self.before + (then if self.blind else f"{text}\n\n{then}")


@dataclass(frozen=True)
class Part:
    """A part of an application.

    cases: a function of the model, the tokens of a text, the number of cases, and a generator of random numbers.
    attempt: a reader's score for a case; more is better. unit: "right" for scores of 0 or 1, or "nats". cluster: what a
    case is about, if other cases may be about the same.
    """

    name: str
    cases: Callable[[Any, int, int, random.Random], Sequence[Any]]
    attempt: Callable[[Reader, Any], float]
    unit: str = "right"
    cluster: Callable[[Any], str] | None = None


@dataclass(frozen=True)
class Page:
    name: str
    text: str


def pages() -> list[Page]:
    """The documentation of this project, as real text: training.md first, the longest manual."""
    paths = sorted(DOCS.rglob("*.md"), key=lambda path: (path.name != "training.md", str(path)))
    return [Page(str(path.relative_to(DOCS)), path.read_text(encoding="utf-8")) for path in paths]


def hide(text: str, lines: Sequence[str], rng: random.Random) -> str:
    """The text with the lines between its own, at random places in their order."""
    rows = text.splitlines()
    places = sorted(rng.choices(range(1, len(rows) + 1), k=len(lines)), reverse=True)
    for place, line in zip(places, reversed(lines), strict=True):
        rows.insert(place, line)
    return "\n".join(rows)


@dataclass(frozen=True)
class Case:
    """A text, a question or a beginning, and the right answer or the ending. about: the page or file of it."""

    text: str
    question: str
    answer: str
    about: str = ""


def answered(reader: Reader, case: Case) -> float:
    return float(case.answer in reader.ask(case.text, case.question))


def continued(reader: Reader, case: Case) -> float:
    return reader.nats(case.text, case.question, case.answer)


def names(rng: random.Random, count: int) -> list[str]:
    """Names such as "amber-falcon", none of which training has seen."""
    return ["-".join(key.words) for key in draw_keys(rng, count, held_out=True)]


def number(rng: random.Random) -> str:
    return draw_value(rng, held_out=True)


def source(case: Case) -> str:
    return case.about


@dataclass(frozen=True)
class Verdict:
    """Which arm to take, and why. take: None if the part is not measurable. difference: of sparse - dense, if it is."""

    take: Literal["dense", "sparse"] | None
    reason: str
    difference: intervals.Estimate | None = None


def judge(
    part: Part,
    scores: dict[str, list[float]],
    seconds: dict[str, list[float]],
    short: bool,
    clusters: Sequence[object] | None = None,
) -> Verdict:
    """The verdict on attempts. short: no text is longer than k. clusters: of the cases; None: each is of its own."""
    of = range(len(scores["dense"])) if clusters is None else clusters
    apart = intervals.clustered_difference if part.unit == "right" else _mean_apart
    gained, lost = apart(scores["dense"], scores["control"], of), apart(scores["sparse"], scores["dense"], of)
    if gained.low is None:
        return Verdict(None, "with one case, or with cases about one page or file alone: ask more with --cases")
    if gained.low <= 0:
        return Verdict(None, "with this model: dense attention is not better with the text than without it")
    assert lost.low is not None and lost.high is not None
    if short:
        return Verdict("dense", "the text is not longer than k, so both are the same", lost)
    if lost.high < 0:
        return Verdict("dense", "sparse attention loses here", lost)
    if sum(seconds["sparse"]) >= sum(seconds["dense"]):
        return Verdict("dense", "sparse attention saves no time at this length", lost)
    return Verdict(
        "sparse", f"if a loss of {max(0.0, -lost.low):.3f} {part.unit}, which is not excluded, is bearable", lost
    )


def _mean_apart(a: Sequence[float], b: Sequence[float], clusters: Sequence[object]) -> intervals.Estimate:
    return intervals.mean([x - y for x, y in zip(a, b, strict=True)], clusters)


def compare(part: Part, model: Local | Remote, tokens: int, count: int, seed: int) -> dict[str, Any]:
    """The figures of a part, after every attempt by every reader in turn: those of each arm, and the verdict.

    quality: {"value", "low", "high", "n", "clusters"}. seconds: the mean of an attempt. held_bytes, read_bytes: of the
    cache, as of `Local.memory`, None of an endpoint. peak_bytes: the most that was allocated on the GPU in an attempt,
    else None. prompt_tokens: of the longest prompt.
    """
    readers = {"dense": Reader(model, "dense"), "sparse": Reader(model, "sparse")}
    readers["control"] = Reader(model, "dense", blind=True)
    scores: dict[str, list[float]] = {name: [] for name in readers}
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    peaks: dict[str, list[int]] = {name: [] for name in readers}
    drawn = part.cases(model, tokens, count, random.Random(seed))
    clusters = range(len(drawn)) if part.cluster is None else [part.cluster(case) for case in drawn]
    if model.gpu:
        for reader in readers.values():
            part.attempt(replace(reader, before="To begin with.\n\n"), drawn[0])  # on pages that no other prompt shares
    model.seen = 0  # behind the attempts that are not timed, whose prompts are longer
    stderr = Console(stderr=True)
    for case in track(drawn, part.name, console=stderr, transient=True, disable=not stderr.is_terminal):
        for name, reader in readers.items():
            if model.gpu:
                torch.cuda.reset_peak_memory_stats(model.gpu)
            begin = time.perf_counter()
            scores[name].append(part.attempt(reader, case))
            seconds[name].append(time.perf_counter() - begin)
            if model.gpu:
                peaks[name].append(torch.cuda.max_memory_allocated(model.gpu))
    estimate = intervals.clustered_share if part.unit == "right" else intervals.mean
    verdict = judge(part, scores, seconds, 0 < model.seen <= model.top_k, clusters)
    arms = {}
    for name in readers:
        held, read = (model.memory(name) if name != "control" else None) or (None, None)
        arms[name] = {
            "quality": estimate(scores[name], clusters).to_dict(),
            "seconds": fmean(seconds[name]),
            "held_bytes": held,
            "read_bytes": read,
            "peak_bytes": max(peaks[name], default=None),
        }
    return {
        "part": part.name,
        "unit": part.unit,
        "prompt_tokens": model.seen,
        "top_k": model.top_k,
        "arms": arms,
        "take": verdict.take,
        "reason": verdict.reason,
        "difference": verdict.difference and verdict.difference.to_dict(),
    }


def show(figures: dict[str, Any]) -> None:
    """Prints a row for each arm of a part, and the verdict."""
    dense, sparse = figures["arms"]["dense"], figures["arms"]["sparse"]
    count, of = dense["quality"]["n"], dense["quality"]["clusters"]
    about = f" about {of} pages or files" if of > 1 else " about one page or file"
    cases = f"{count} case{'s' * (count > 1)}" + about * (of < count)
    longest, k = figures["prompt_tokens"], figures["top_k"] or "?"
    print(f"{figures['part']}: {cases}, prompts of up to {longest:,} tokens, k = {k}")
    for name, arm in figures["arms"].items():
        memory = ""
        if arm["held_bytes"]:
            memory = f"{arm['held_bytes'] / 2**20:7.1f} MiB held {arm['read_bytes'] / 2**20:6.2f} MiB read"
        if arm["peak_bytes"]:
            memory += f" {arm['peak_bytes'] / 2**20:7.1f} MiB peak"
        shown = quality(arm["quality"], figures["unit"])
        print(f"  {name:<8} {shown:<26} {figures['unit']:<6} {arm['seconds']:6.2f} s {memory}".rstrip())
    if figures["take"] is None:
        print(f"  not measurable {figures['reason']}\n")
        return
    times = sparse["seconds"] / dense["seconds"]
    apart = interval(figures["difference"], "+.3f")
    reason = f"{': ' if figures['take'] == 'dense' else ', '}{figures['reason']}"
    print(f"  sparse - dense {apart} {figures['unit']}, {times:.2f} of the time. Take {figures['take']}{reason}\n")


def quality(estimate: dict[str, Any], unit: str) -> str:
    """A share as "50.0% (25.0% to 75.0%)", nats as "-1.234 (-1.300 to -1.200)"."""
    return interval(estimate, ".1%" if unit == "right" else ".3f")


def interval(estimate: dict[str, Any], form: str) -> str:
    bounds = [estimate["low"], estimate["high"]]
    known = "" if bounds[0] is None else " ({} to {})".format(*(format(x, form) for x in bounds))
    return format(estimate["value"], form) + known


def main(about: str, *parts: Part) -> None:
    """Runs the parts of an example as its command says. Exits with 2, and one line, if something cannot work."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model of this machine: sparse (the default), base, smollm2, a folder")
    parser.add_argument("--url", help="an OpenAI-compatible endpoint, with its /v1, instead of --model")
    parser.add_argument("--sparse", help="the endpoint's sparse model, else the first that it lists")
    parser.add_argument("--dense", help="its dense form, else the sparse one's name with :dense")
    parser.add_argument(
        "--top-k", type=int, default=0, help="keys per query; 0: the model's own, and 512 for a dense one"
    )
    parser.add_argument("--tokens", type=int, default=4096, help=f"of a text, at least {LEAST}")
    parser.add_argument("--cases", type=int, default=16, help="of each part; one tells nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="of a model of this machine: auto (the default), cpu, cuda")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    try:
        _check(args)
        model: Local | Remote
        if args.url:
            model = Remote(args.url, args.sparse or "", args.dense or "", args.top_k)
        else:
            model = Local(args.model or "sparse", args.top_k, args.device or "auto")
        model.check(args.tokens)
        figures = []
        for part in parts:
            figures.append(compare(part, model, args.tokens, args.cases, args.seed))
            show(figures[-1])
        if args.out:
            asked = {name: value for name, value in vars(args).items() if name != "out"}
            write_json(args.out, {"asked": asked, "environment": environment(), "parts": figures})
    except (UserError, Refused) as error:
        sys.exit(_failed(parser.prog, error))
    except KeyboardInterrupt:
        sys.exit(130)


def _check(args: argparse.Namespace) -> None:
    """UserError for options that mean nothing, or nothing together."""
    for name, least in (("tokens", LEAST), ("cases", 1), ("top_k", 0)):
        if getattr(args, name) < least:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is {getattr(args, name)}; it must be at least {least}")
    if args.url and args.model:
        raise UserError("--model is of this machine and --url asks an endpoint; give one of the two")
    if args.url and args.device:
        raise UserError("--device is of a model of this machine, and --url asks an endpoint; give one of the two")
    if not args.url and (args.sparse or args.dense):
        raise UserError("--sparse and --dense name models of an endpoint; give its --url")


def _failed(program: str, error: Exception) -> int:
    print(f"{program}: error: {error}", file=sys.stderr)
    return 2
