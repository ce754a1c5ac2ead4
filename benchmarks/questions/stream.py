"""Text that streams in: appended to a live cache against read anew."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from subject import Subject, percent, show
from torch import Tensor

from tokensieve.engine import Engine, EngineConfig, Request, Sampling
from tokensieve.evals import Arm, intervals
from tokensieve.evals.suites import asking
from tokensieve.model import DecoderForCausalLM, LatentCache
from tokensieve.report.sections import text_of

PIECES = (1, 16, 64, 256)  # tokens that arrive at once
MOST = 64  # pieces of a text that are appended
ARRIVED = 64  # tokens by which a prompt of the engine grows

ENGINES = {
    "whole chunks of 512 tokens": EngineConfig(pages=128),
    "whole chunks of 64 tokens": EngineConfig(pages=128, chunk=64),
    "nothing": EngineConfig(pages=128, prefix_cache=False),
}


def stream(subject: Subject) -> dict[str, Any]:
    """The end of each text appended to a live cache, a piece at a time, against the whole text read anew."""
    texts, half = subject.texts[: subject.sizes.few], subject.sizes.context // 512 * 256
    found: dict[str, Any] = {}
    for selection in ("indexer", "dense"):
        with asking(Arm(subject.sparse, selection)):
            read = [_timed(lambda text=text: _logits(subject.sparse, text, half)) for text in texts]
            for piece in PIECES:
                appended = [_appended(subject.sparse, text, half, piece) for text in texts]
                found[f"{selection} {piece}"] = _agreement(texts, read, appended)
    rows = [(*name.split(), f"{of['largest']:.1e}", percent(of["same"]), text_of(vars(of["ratio"]), 5),
             f"{of['ms']:.0f}", f"{of['anew_ms']:.0f}") for name, of in found.items()]  # fmt: skip
    show(f"Up to {MOST} pieces appended, {len(texts)} texts of {subject.sizes.context} tokens, median times",
         ("attention", "tokens of a piece", "largest difference of a logit", "same best token",
          "perplexity over anew's", "ms for the last piece", "ms to read all anew"), rows)  # fmt: skip
    engines = {name: _first_token(subject, texts, config) for name, config in ENGINES.items()}
    alone = engines["nothing"]["tokens"]
    for of in engines.values():
        same = [a == b for a, b in zip(of["tokens"], alone, strict=True)]
        of["same"] = intervals.share(sum(same), len(same))
    show(f"The first token of an answer in the engine, the prompt grown by {ARRIVED} tokens; median times",
         ("kept of the prompt before", "ms", "tokens found in the cache", "token as if nothing is kept"),
         [(name, f"{of['ms']:.0f}", f"{of['cached']:,}", percent(of["same"]))
          for name, of in engines.items()])  # fmt: skip
    return found | {"engine": engines}


def _timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What `run` returns, and its milliseconds."""
    begin = time.perf_counter()
    return run(), 1000 * (time.perf_counter() - begin)


def _logits(model: DecoderForCausalLM, text: Tensor, last: int, cache: LatentCache | None = None) -> Tensor:
    """Logits (last, V) after the tokens of a text, or after these following those of a cache."""
    return model(text[None], past_key_values=cache, use_cache=cache is not None, logits_to_keep=last).logits[0].float()


def _appended(model: DecoderForCausalLM, text: Tensor, half: int, piece: int) -> tuple[Tensor, float]:
    """Logits of the appended pieces, (tokens, V), and the milliseconds of the last. All before them is read at once."""
    begin = max(len(text) - half, len(text) - MOST * piece)
    cache, ms = LatentCache(), 0.0
    _logits(model, text[:begin], 1, cache)
    logits = []
    for part in text[begin:].split(piece):
        more, ms = _timed(lambda part=part: _logits(model, part, len(part), cache))
        logits.append(more)
    return torch.cat(logits), ms


def _agreement(
    texts: Sequence[Tensor], read: Sequence[tuple[Tensor, float]], appended: Sequence[tuple[Tensor, float]]
) -> dict[str, Any]:
    """Logits of the appended tokens beside those of the same tokens in the text read anew."""
    largest, same, extra = [], [], []
    for text, (whole, _), (pieces, _) in zip(texts, read, appended, strict=True):
        anew, next_tokens = whole[-len(pieces) :], text[len(text) - len(pieces) + 1 :]
        largest.append(float((pieces - anew).abs().max()))
        same.append((pieces.argmax(-1) == anew.argmax(-1)).double().tolist())
        losses = [float(F.cross_entropy(logits[:-1], next_tokens)) for logits in (pieces, anew)]
        extra.append(losses[0] - losses[1])
    of_text = [number for number, tokens in enumerate(same) for _ in tokens]
    return {
        "largest": max(largest),
        "same": intervals.clustered_share([value for tokens in same for value in tokens], of_text),
        "ratio": intervals.ratio(extra),
        "ms": statistics.median(ms for _, ms in appended),
        "anew_ms": statistics.median(ms for _, ms in read),
    }


def _first_token(subject: Subject, texts: Sequence[Tensor], config: EngineConfig) -> dict[str, Any]:
    """Each text but its last tokens is a prompt of the engine, and then all of it, which is timed."""
    engine = Engine(subject.sparse, subject.tokenizer, config)
    times, tokens, cached = [], [], 0
    for number, text in enumerate(texts):
        for length in (len(text) - ARRIVED, len(text)):
            begin = time.perf_counter()
            engine.add(Request(f"{number} {length}", tuple(text[:length].tolist()), Sampling(max_tokens=1)))
            while engine.busy:
                for output in engine.step():
                    if length == len(text) and output.tokens:
                        tokens += output.tokens
                        cached = output.cached_tokens
        times.append(1000 * (time.perf_counter() - begin))
    return {"ms": statistics.median(times), "cached": cached, "tokens": tokens}
