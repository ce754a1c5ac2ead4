"""The engine under load: many requests at once, and the time that each of them waits."""

import gc
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from tokensieve.config import UserError

# What this takes from the engine and the model, the scheduler's own lists included: a filled cache has no other way in.
from tokensieve.engine import Engine, EngineConfig, Request, Sampling
from tokensieve.engine.distributed import OneOfRanks
from tokensieve.mesh import Mesh
from tokensieve.model import DecoderForCausalLM
from tokensieve.ops.quant import PAGE_TOKENS

NOISE_TOKENS = 1 << 15  # entries that are made at once


@dataclass(frozen=True)
class Workload:
    """Requests that all arrive at once.

    requests: their number. prompt, new: tokens of each. selection: a name that `tokensieve.selecting` takes,
    module:function too. chunk, top_k: as in EngineConfig; 0 takes the engine's own.

    filled: the cache is filled with noise, and of the prompts only the `last` tokens are run. This measures the decode
    rate, and the prefill of these tokens, at a context that would take long to read.
    """

    requests: int
    prompt: int
    new: int = 64
    selection: str = "indexer"
    filled: bool = False
    chunk: int = 0
    top_k: int = 0
    last: int = 1


@dataclass(frozen=True)
class Served:
    """The figures of one workload. Times are in seconds; p50 and p99 are the median and the 99th percentile."""

    seconds: float
    tokens_per_second: float  # generated, over all requests
    prompt_tokens_per_second: float  # until the last request's first token; 0 if only one token of a prompt is run
    first_p50: float  # to the first token
    first_p99: float
    next_p50: float  # between two tokens of a request
    next_p99: float
    next_p99_over_p50: float
    last_chunk: float  # of a prompt: the last step that read one
    pages: int
    memory_bytes: int  # at the peak on a GPU; of the process on a CPU


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def fill_with_noise(engine: Engine) -> None:
    """Writes an entry and a key into every slot of every page, with the spread of normalized ones."""
    pools, model = engine.runner.pools, engine.model
    places = pools.entries[0].shape[0] * PAGE_TOKENS
    entry = engine.runner.entry
    for layer in range(len(pools.entries)):
        for a in range(0, places, NOISE_TOKENS):
            slots = torch.arange(a, min(a + NOISE_TOKENS, places), device=model.device)
            entries = torch.randn(len(slots), entry.numbers, dtype=model.dtype, device=model.device)
            keys = torch.randn(len(slots), getattr(model.config, "index_head_dim", 0), device=model.device)
            pools.write(layer, entry, entries, keys.to(model.dtype), slots)


def serve_load(
    model: DecoderForCausalLM,
    tokenizer: Any,
    load: Workload,
    prompts: Sequence[tuple[int, ...]],
    ranks: Mesh | None = None,
) -> Served:
    """Runs the workload on an engine of its own, after a short one that compiles and records what happens only once.

    ranks: of a model that is spread over several; all of them call this with the same workload, and none leads.

    Raises:
        UserError: the engine failed.
    """
    on_gpu = model.device.type == "cuda"
    pages = load.requests * (-(-(load.prompt + load.new + 1) // PAGE_TOKENS) + 1)
    config = EngineConfig(pages=pages, running=load.requests, prefix_cache=False, top_k=load.top_k)
    if load.chunk:
        config = replace(config, chunk=load.chunk)
    if load.filled:
        config = replace(config, chunks=load.requests)  # all begin in the same step
    if ranks is None or ranks.size == 1:
        engine = Engine(model, tokenizer, config)
    else:
        engine = OneOfRanks(model, tokenizer, config, ranks)
    try:
        if load.filled:
            fill_with_noise(engine)
        if on_gpu or not load.filled:
            _run(engine, load, prompts, 4 if on_gpu else 1)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        return _run(engine, load, prompts, load.new)
    finally:
        # The cache and its graphs know each other: without this they would still be there when the next ones are made.
        del engine
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


def _run(engine: Engine, load: Workload, prompts: Sequence[tuple[int, ...]], new: int) -> Served:
    device = engine.model.device
    for i, prompt in enumerate(prompts[: load.requests]):
        sampling = Sampling(max_tokens=new, ignore_eos=True)
        engine.add(Request(str(i), prompt, sampling, load.selection))
    if load.filled:
        scheduler, entered = engine.scheduler, -1
        while scheduler.waiting and len(scheduler.running) > entered:  # some at a time
            entered = len(scheduler.running)
            scheduler.admit()
        assert not scheduler.waiting  # the cache was made for them
        for running in scheduler.running:
            running.cached = running.prompt - load.last
    times: dict[str, list[float]] = {str(i): [] for i in range(load.requests)}
    used, last_chunk = 0, 0.0
    begin = last = time.perf_counter()
    while engine.busy:
        in_prompt = any(r.in_prompt for r in engine.scheduler.running) or not times["0"]
        outputs = engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        last_chunk, last = now - last if in_prompt else last_chunk, now
        used = max(used, engine.scheduler.pool.used)
        for output in outputs:
            if output.finish == "error":
                raise UserError(f"the engine failed: {output.error}")
            times[output.id].append(now - begin)
    seconds = time.perf_counter() - begin
    first = [arrivals[0] for arrivals in times.values()]
    between = [b - a for arrivals in times.values() for a, b in itertools.pairwise(arrivals)] or [0.0]
    run = load.last if load.filled else load.prompt
    next_p50, next_p99 = statistics.median(between), percentile(between, 0.99)
    on_gpu = device.type == "cuda"
    return Served(
        seconds,
        tokens_per_second=sum(map(len, times.values())) / seconds,
        prompt_tokens_per_second=load.requests * run / max(first) if run > 1 else 0.0,
        first_p50=statistics.median(first),
        first_p99=percentile(first, 0.99),
        next_p50=next_p50,
        next_p99=next_p99,
        next_p99_over_p50=next_p99 / next_p50 if next_p50 else 0.0,
        last_chunk=last_chunk,
        pages=used,
        memory_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss,
    )
