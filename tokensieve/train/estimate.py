"""An estimate of a run before it starts: its counted costs, at a speed measured on the model itself.

The share of its peak that a device reaches differs more than tenfold between stages, widths and backends, so we time a
short pass instead of assuming a share of a matrix product's speed. On a CPU one short row is enough; only a whole
micro-batch keeps a GPU busy.
"""

import time
from dataclasses import replace

import psutil
import torch

from tokensieve import cost
from tokensieve.config import PhaseConfig, TrainConfig
from tokensieve.model import DecoderForCausalLM
from tokensieve.train.stage import Stage, StepTotals, backward, options_of

SHORTEST = 512  # tokens of the timed row, unless the run's own rows are shorter


def estimate(config: TrainConfig, stage: Stage, model: DecoderForCausalLM, device: torch.device) -> cost.Estimate:
    """Memory and time of a run of the prepared `model`, without preparing data, writing checkpoints and compiling."""
    value_bytes = 2 if device.type == "cuda" else 4
    tokens, rows = row_tokens(config, model), 1
    if device.type == "cuda":
        tokens, rows = config.phases[0].context, config.phases[0].micro_batch
    one = replace(config, phases=(PhaseConfig(1, tokens, rows, rows),))
    flops = cost.run_estimate(model.config, one, 1.0, value_bytes=value_bytes).flops
    process = process_bytes(model) if device.type == "cpu" else 0
    rate = flops / rehearse(config, stage, model, tokens, rows, device)
    return replace(cost.run_estimate(model.config, config, rate, value_bytes=value_bytes), process_bytes=process)


def process_bytes(model: DecoderForCausalLM) -> int:
    """Bytes of main memory that this process holds beside the model's tensors: the libraries, above all."""
    tensors = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return max(0, psutil.Process().memory_info().rss - tensors)


def row_tokens(config: TrainConfig, model: DecoderForCausalLM) -> int:
    """Tokens of the row to time: enough that selection leaves keys out, but no more than the run's own rows have."""
    selecting = config.stage == "adapt" and config.selection
    return min(max(p.context for p in config.phases), max(SHORTEST, 2 * model.top_k if selecting else 0))


def rehearse(
    config: TrainConfig, stage: Stage, model: DecoderForCausalLM, tokens: int, rows: int, device: torch.device
) -> float:
    """Seconds of a forward and a backward pass over `rows` rows. Leaves the model as it was, draws no random number."""
    positions = torch.arange(tokens).expand(rows, -1)
    ids = positions % model.config.vocab_size
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    totals, options = StepTotals(labels=ids.numel(), queries=ids.numel()), options_of(stage, config)
    seconds: list[float] = []
    while len(seconds) < 2:  # the first pass also pays for one-time setup, such as compiled kernels
        begin = time.perf_counter()
        try:
            backward(stage, model, batch, totals, options, device)
        except ValueError as error:
            if "NaN" not in str(error):  # if weights are NaN, the first step reports it, with its number
                raise
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    model.zero_grad(set_to_none=True)
    return min(seconds)
