"""An estimate of a run before it starts: its counted costs, at a speed measured on the model itself.

The share of its peak that a device reaches differs more than tenfold between stages, widths and backends, so we time a
pass instead of assuming a share of a matrix product's speed. On a CPU one row is enough, a short one if the run's own
take long; only a whole micro-batch keeps a GPU busy.
"""

import statistics
import time
from dataclasses import replace
from typing import NamedTuple

import psutil
import torch

from tokensieve import cost
from tokensieve.config import PhaseConfig, TrainConfig
from tokensieve.model import DecoderForCausalLM
from tokensieve.train.forecast import Forecast
from tokensieve.train.lora import adapters_of
from tokensieve.train.stage import Stage, StepTotals, backward, options_of

SHORTEST = 512  # tokens of the first timed row, unless the run's own rows are shorter
AFFORDABLE = 5.0  # seconds of a pass for which longer rows are timed too: short ones make a run seem twice as long
AGREEMENT = 1.15  # passes are repeated until the last two differ by no more than this factor,
ENOUGH = 12.0  # or have taken so many seconds
PREEMPTED = 100.0  # times a second that the main thread lost its processor: others want it too, and two passes may
SHARED = 8.0  # agree by chance, so that passes of so many seconds count,
SHARE = 0.1  # or of this part of the run, if that is less


class Rehearsal(NamedTuple):
    """A timed pass: its counted FLOPs, and its seconds."""

    flops: float
    seconds: float


def estimate(
    config: TrainConfig,
    stage: Stage,
    model: DecoderForCausalLM,
    device: torch.device,
    affordable: float = AFFORDABLE,
) -> tuple[cost.Estimate, Rehearsal]:
    """Memory and time of a run of the prepared `model`, and the pass that was timed for it.

    Preparing data, writing checkpoints and compiling are left out. affordable: seconds of a pass for which rows longer
    than the first timed one are timed too, on a CPU.
    """
    value_bytes, adapters = 2 if device.type == "cuda" else 4, adapters_of(model)

    def flops(run: TrainConfig) -> float:
        return cost.run_estimate(model.config, run, 1.0, value_bytes=value_bytes, adapters=adapters).flops

    def counted(tokens: int, rows: int) -> float:
        return flops(replace(config, phases=(PhaseConfig(1, tokens, rows, rows),)))

    def timed(tokens: int, rows: int) -> Rehearsal:
        one = counted(tokens, rows)
        return Rehearsal(one, rehearse(config, stage, model, tokens, rows, device, flops(config) / one))

    if device.type == "cuda":
        found = timed(config.phases[0].context, config.phases[0].micro_batch)
    else:
        tokens, whole = row_tokens(config, model), config.phases[0].context
        found = timed(tokens, 1)
        while tokens < whole:
            tokens = min(whole, 4 * tokens)
            expected = found.seconds * counted(tokens, 1) / found.flops
            if expected > affordable:
                break
            found = timed(tokens, 1)
    rate = found.flops / found.seconds
    needed = cost.run_estimate(model.config, config, rate, value_bytes=value_bytes, adapters=adapters)
    return replace(needed, process_bytes=process_bytes(model, device)), found


def forecast(config: TrainConfig, model: DecoderForCausalLM, first: int, rehearsal: Rehearsal | None) -> Forecast:
    """The forecast of a run that goes on after `first` steps."""
    phases = cost.phase_estimates(model.config, config, 1.0, adapters=adapters_of(model))
    steps = [e.flops / p.steps for p, e in zip(config.phases, phases, strict=True) for _ in range(p.steps)]
    return Forecast(steps[first:], rehearsal)


def process_bytes(model: DecoderForCausalLM, device: torch.device) -> int:
    """Bytes of the device's memory that are taken beside the model's tensors: by the libraries, above all.

    On a GPU these include what other processes hold, since the run cannot have it either.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, total - free - torch.cuda.memory_reserved(device))
    tensors = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return max(0, psutil.Process().memory_info().rss - tensors)


def row_tokens(config: TrainConfig, model: DecoderForCausalLM) -> int:
    """Tokens of the first row to time: enough that selection leaves keys out, but no more than the run's own rows."""
    selecting = config.stage == "adapt" and config.selection
    return min(max(p.context for p in config.phases), max(SHORTEST, 2 * model.top_k if selecting else 0))


def rehearse(
    config: TrainConfig,
    stage: Stage,
    model: DecoderForCausalLM,
    tokens: int,
    rows: int,
    device: torch.device,
    passes: float,
) -> float:
    """Seconds of a forward and a backward pass over `rows` rows, as the last two of several passes agree.

    The first pass also pays for one-time setup, such as compiled kernels. If no two agree in time, or if other
    processes use the same processors, it is the mean of all but the first. Leaves the model as it was, and draws no
    random number.

    passes: how many of them the whole run is worth.
    """
    positions = torch.arange(tokens).expand(rows, -1)
    ids = positions % model.config.vocab_size
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    totals, options = StepTotals(labels=ids.numel(), queries=ids.numel()), options_of(stage, config)
    seconds: list[float] = []
    shared, before = False, _preemptions()
    while len(seconds) < 2 or not _enough(seconds, passes if shared else 0.0):
        begin = time.perf_counter()
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # an adapter's dropout draws numbers
                backward(stage, model, batch, totals, options, device)
        except ValueError as error:
            if "NaN" not in str(error):  # if weights are NaN, the first step reports it, with its number
                raise
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
        shared = device.type == "cpu" and _preemptions() - before > PREEMPTED * sum(seconds)
    model.zero_grad(set_to_none=True)
    return statistics.fmean(seconds[-2:] if _agree(seconds) and not shared else seconds[1:])


def _preemptions() -> int:
    """How often the main thread lost its processor so far to another one; 0 if the system cannot tell."""
    try:
        return psutil.Process().num_ctx_switches().involuntary
    except NotImplementedError:  # some sandboxes count none
        return 0


def _enough(seconds: list[float], passes: float) -> bool:
    """Whether these tell how long a pass takes. passes: of the run if processors are shared, else 0."""
    if not _agree(seconds):
        return len(seconds) > 2 and sum(seconds) >= ENOUGH
    return sum(seconds) >= min(SHARED, SHARE * passes * seconds[-1])


def _agree(seconds: list[float]) -> bool:
    """Whether the last two do."""
    return max(seconds[-2:]) <= AGREEMENT * min(seconds[-2:])
