"""The time of one more token, and of one more chunk of a prompt, by the length of the context: in the engine.

Legend: T tokens.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from tokensieve import cost
from tokensieve.engine.runner import Runner
from tokensieve.evals.progress import OnProgress
from tokensieve.model import DecoderForCausalLM
from tokensieve.model.paged import INDEX_ROOM
from tokensieve.model.positions import check_positions
from tokensieve.ops.quant import PAGE_TOKENS

CHUNK = 256  # tokens of the timed chunk
NOISE = 0.01  # of a repeated entry, relative to the entries' spread


def filled(model: DecoderForCausalLM, prompt_T: Tensor, tokens: int, seed: int = 0) -> Runner:
    """A runner whose pages 0, 1, ... hold `tokens` tokens: a prompt's entries, then the same again and again.

    The cost of a step depends on the number of entries, and through the selection a little on their values: equal
    scores are told apart by position, which takes longer. So the entries are real ones, and repeated ones get 1% of
    noise, because exact copies would tie.
    """
    pages = -(-tokens // PAGE_TOKENS)
    runner = Runner(model, pages + INDEX_ROOM)  # as in a served cache, no key is copied for want of room behind it
    real = min(len(prompt_T), tokens) // PAGE_TOKENS
    for begin in range(0, real * PAGE_TOKENS, CHUNK):
        chunk = prompt_T[begin : min(begin + CHUNK, real * PAGE_TOKENS)].tolist()
        runner.chunk(chunk, begin, _pages(tokens), _selector(model))
    generator = torch.Generator(model.device).manual_seed(seed)
    source = torch.arange(real, pages, device=model.device) % real
    for pool in (*runner.pools.entries, *runner.pools.index):
        if pool.numel():
            copies = pool[source]
            if pool.is_floating_point():
                noise = torch.randn(copies.shape, generator=generator, device=model.device)
                copies += (NOISE * pool[:real].float().std() * noise).to(copies.dtype)
            pool[real:pages] = copies
    return runner


def context_ms(
    models: Mapping[str, DecoderForCausalLM],
    prompt_T: Tensor,
    contexts: Sequence[int],
    token_rounds: int = 9,
    chunk_rounds: int = 3,
    on_progress: OnProgress | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Milliseconds of one decoded token, and of one chunk of `CHUNK` prompt tokens: {name: {str(context): ms}} each.

    The engine runs both, one sequence alone: the token is the last of `context`, the chunk the last `CHUNK` of them.
    The models take turns, so that a machine that slows down slows all of them, and the figure is the median of the
    rounds; a token is run twice a turn and timed once. `prompt_T`: tokens to fill the caches with (`filled`).

    Raises:
        UserError: a context past a model's positions, or a prompt shorter than a page of the cache.
    """
    longest = max(contexts)
    for name, model in models.items():
        what = f"{name}: a context of {longest} tokens is"
        check_positions(model.config.max_position_embeddings, longest, what, "time shorter contexts")
    runners = {name: filled(model, prompt_T, longest) for name, model in models.items()}
    token_ms: dict[str, dict[str, float]] = {name: {} for name in models}
    chunk_ms: dict[str, dict[str, float]] = {name: {} for name in models}
    for done, context in enumerate(contexts, 1):
        step = partial(_step, prompt_T[:1].tolist(), context)
        read = partial(_read, prompt_T[: min(CHUNK, context)].tolist(), context)
        for figures, run, rounds, warm in ((token_ms, step, token_rounds, 1), (chunk_ms, read, chunk_rounds, 0)):
            for name, ms in _medians(runners, run, rounds, warm).items():
                figures[name][str(context)] = ms
        if on_progress is not None:
            on_progress(f"a context of {context:,}", done, len(contexts))
    return token_ms, chunk_ms


def _step(token: list[int], context: int, runner: Runner) -> None:
    runner.step(token, [context], [_pages(context)], _selector(runner.model))


def _read(chunk: list[int], context: int, runner: Runner) -> None:
    runner.chunk(chunk, context - len(chunk), _pages(context), _selector(runner.model))


def _pages(tokens: int) -> list[int]:
    return list(range(-(-tokens // PAGE_TOKENS)))


def _selector(model: DecoderForCausalLM) -> str:
    return "indexer" if model.is_sparse else "dense"


def _medians(runners: Mapping[str, Runner], run: Callable[[Runner], None], rounds: int, warm: int) -> dict[str, float]:
    """Median milliseconds of `run` for each runner, in turns; `warm` untimed calls before each timed one."""
    turns: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            for _ in range(warm):
                run(runner)
            _finish(runner.device)
            begin = time.perf_counter()
            run(runner)
            _finish(runner.device)
            turns[name].append(1000 * (time.perf_counter() - begin))
    return {name: statistics.median(ms) for name, ms in turns.items()}


def crossover(ms: Mapping[str, Mapping[str, float]]) -> int | None:
    """The shortest measured context from which on sparse takes no longer than dense; None if there is none."""
    found = None
    for context in sorted(ms["dense"], key=int, reverse=True):
        if ms["sparse"][context] > ms["dense"][context]:
            break
        found = int(context)
    return found


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_reads(shape: cost.Shape, contexts: Sequence[int], layout: cost.Layout) -> dict[str, dict[str, int]]:
    """Bytes of cache that one token reads, of all layers, by the context: {"dense", "sparse": {str(context): bytes}}.

    "index_keys" are those of sparse that go to the index keys: one for each token of the context, and none as long as
    the context is at most k. shape: a sparse model's.
    """
    reads = {
        name: {str(c): cost.decode_cache_bytes(shape, c, layout, sparse=name == "sparse") for c in contexts}
        for name in ("dense", "sparse")
    }
    key = shape.index_layers * cost.index_bytes(shape, layout)
    return reads | {"index_keys": {str(c): c * key if c > shape.top_k else 0 for c in contexts}}
