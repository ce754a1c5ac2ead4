"""The engine under load: many requests at once, and how long each waits.

Legend: E entry width, D index width.
"""

import gc
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Request, Sampling
from tokensieve.engine.distributed import OneOfRanks
from tokensieve.engine.tensor_parallel import shard
from tokensieve.families import ModelConfig
from tokensieve.mesh import Mesh
from tokensieve.model import DecoderForCausalLM, fp8
from tokensieve.ops.quant import PAGE_TOKENS

NOISE_TOKENS = 1 << 15  # entries that are made at once


@dataclass(frozen=True)
class Load:
    """requests: all at once. prompt, new: tokens of each. selection: "indexer" or "dense". chunk, top_k: as in EngineConfig; 0: its own.

    filled: the cache is filled with noise and prompts are not run, but for their last token: what is wanted is the decode rate at a
    context that would take long to read.
    """

    requests: int
    prompt: int
    new: int = 64
    selection: str = "indexer"
    filled: bool = False
    chunk: int = 0
    top_k: int = 0


@dataclass(frozen=True)
class Served:
    """Of one load. Seconds of requests: the median and the 99th percentile. last_chunk: of a single prompt, where it is run."""

    seconds: float
    tokens_per_second: float  # generated, over all requests
    prompt_tokens_per_second: float  # until the last request's first token
    first_p50: float  # to the first token
    first_p99: float
    next_p50: float  # between two tokens of a request
    next_p99: float
    last_chunk: float
    pages: int
    memory_bytes: int  # at the peak on a GPU; of the process on a CPU


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def random_model(
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
    in_fp8: bool = False,
    ranks: Mesh | None = None,
) -> Any:
    """A model of this shape with drawn weights, made on the device: no checkpoint of it need exist. in_fp8: with weights in FP8 blocks.

    With ranks this one's part of it. All of them draw the same numbers, so that what should be the same on all is.
    """
    with torch.device("meta"):
        model = DecoderForCausalLM(config).to(dtype)
        if in_fp8:
            fp8.hold(model, fp8.holdable(model, set(model.state_dict())))
    if ranks is not None:
        shard(model, ranks)
    for name, part in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("weights_proj.weight", "e_score_correction_bias")):
            part.data = part.data.float()
    model = model.to_empty(device=device)
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, fp8.BlockLinear | fp8.BlockExperts):
            for name, x in module.named_parameters():
                _draw_blocks(x.data, name.endswith("_scale_inv"), config.initializer_range)
        else:
            model._init_weights(module)
    for buffer in model.buffers():
        buffer.zero_()
    return model.eval()


def _draw_blocks(x: torch.Tensor, is_scale: bool, std: float) -> None:
    if is_scale:
        x.fill_(std)
        return
    for matrix in x.flatten(0, -3) if x.dim() > 2 else x[None]:  # all at once they are four times as large for a moment
        matrix.copy_(torch.randn(matrix.shape, device=x.device))


def random_prompts(count: int, length: int, vocabulary: int, seed: int = 0) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [tuple(draw.choices(range(vocabulary // 4, vocabulary), k=length)) for _ in range(count)]


def fill_with_noise(engine: Engine) -> None:
    """Every place of every page gets an entry and a key, as spread as normalized ones are."""
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
    load: Load,
    prompts: Sequence[tuple[int, ...]],
    ranks: Mesh | None = None,
) -> Served:
    """The load on an engine of its own, after a short one that compiles and records what runs once. UserError for what cannot be served.

    Where there are ranks, all of them call this with the same load, and none leads.
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


def _run(engine: Engine, load: Load, prompts: Sequence[tuple[int, ...]], new: int) -> Served:
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
            running.cached = running.prompt - 1
    said: dict[str, list[float]] = {str(i): [] for i in range(load.requests)}
    used, last_chunk = 0, 0.0
    begin = last = time.perf_counter()
    while engine.busy:
        in_prompt = any(r.in_prompt for r in engine.scheduler.running) or not said["0"]
        outputs = engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        last_chunk, last = now - last if in_prompt else last_chunk, now
        used = max(used, engine.scheduler.pool.used)
        for output in outputs:
            if output.finish == "error":
                raise UserError(f"the engine failed: {output.error}")
            said[output.id].append(now - begin)
    seconds = time.perf_counter() - begin
    first = [times[0] for times in said.values()]
    between = [b - a for times in said.values() for a, b in itertools.pairwise(times)] or [0.0]
    on_gpu = device.type == "cuda"
    return Served(
        seconds,
        tokens_per_second=sum(map(len, said.values())) / seconds,
        prompt_tokens_per_second=0.0 if load.filled else load.requests * load.prompt / max(first),
        first_p50=statistics.median(first),
        first_p99=percentile(first, 0.99),
        next_p50=statistics.median(between),
        next_p99=percentile(between, 0.99),
        last_chunk=last_chunk,
        pages=used,
        memory_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss,
    )
