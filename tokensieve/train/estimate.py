"""What a run will need, told before it starts: its costs as counted, at a speed that is measured on the model itself.

How much of its peak a device reaches differs more than tenfold between stages, widths and backends, so no share of a matrix product's speed
would do. On a CPU one short row tells; a GPU is only busy with a whole micro-batch.
"""

import time
from dataclasses import replace

import torch

from tokensieve import cost
from tokensieve.config import PhaseConfig, TrainConfig
from tokensieve.model import DecoderForCausalLM
from tokensieve.train.stage import Stage, StepTotals, backward, options_of

SHORTEST = 512  # tokens of the rehearsed row, where the run's own are not shorter


def estimate(config: TrainConfig, stage: Stage, model: DecoderForCausalLM, device: torch.device) -> cost.Estimate:
    """Memory and time of a run of the prepared `model`; preparing data, writing checkpoints and compiling come on top."""
    value_bytes = 2 if device.type == "cuda" else 4
    tokens, rows = row_tokens(config, model), 1
    if device.type == "cuda":
        tokens, rows = config.phases[0].context, config.phases[0].micro_batch
    one = replace(config, phases=(PhaseConfig(1, tokens, rows, rows),))
    flops = cost.run_estimate(model.config, one, 1.0, value_bytes=value_bytes).flops
    rate = flops / rehearse(config, stage, model, tokens, rows, device)
    return cost.run_estimate(model.config, config, rate, value_bytes=value_bytes)


def row_tokens(config: TrainConfig, model: DecoderForCausalLM) -> int:
    """So many that something is left out by the selection, but no more than the run's own rows have."""
    selecting = config.stage == "adapt" and config.selection
    return min(max(p.context for p in config.phases), max(SHORTEST, 2 * model.top_k if selecting else 0))


def rehearse(
    config: TrainConfig, stage: Stage, model: DecoderForCausalLM, tokens: int, rows: int, device: torch.device
) -> float:
    """Seconds of a forward and a backward pass over some rows. Leaves the model as it was and draws no random number."""
    positions = torch.arange(tokens).expand(rows, -1)
    ids = positions % model.config.vocab_size
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    totals, options = StepTotals(labels=ids.numel(), queries=ids.numel()), options_of(stage, config)
    seconds: list[float] = []
    # The first pass also pays for what is set up once; beside a second that is little.
    while not seconds or (len(seconds) < 2 and seconds[0] < 1.0):
        begin = time.perf_counter()
        try:
            backward(stage, model, batch, totals, options, device)
        except ValueError as error:
            if "NaN" not in str(error):  # NaN among the weights: the first step says so, with its number
                raise
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    model.zero_grad(set_to_none=True)
    return min(seconds)
