"""The micro-batches of a run's steps.

Legend: B sequences of a micro-batch, S tokens each.
"""

import signal
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from tokensieve.config import TrainConfig
from tokensieve.train.parallelize import Division
from tokensieve.train.schedule import position
from tokensieve.train.stage import StepTotals


def batches(
    config: TrainConfig, datasets: list, first: int, last: int, division: Division
) -> Iterator[tuple[int, list[dict[str, Tensor]]]]:
    """(step, this rank's micro-batches) from `first` on.

    Each phase reads its own dataset, from the first sequence of the step.
    """
    step = first
    while step < last:
        at = position(config.phases, step)
        phase = config.phases[at.phase]
        dataset, size, shards = datasets[at.phase], phase.micro_batch, division.shards
        left = range(at.sequence, len(dataset))
        own = left if shards == 1 else [i for i in left if i // size % shards == division.shard]
        loader = DataLoader(
            Subset(dataset, own),
            batch_size=size,
            num_workers=config.workers,
            prefetch_factor=4 if config.workers else None,
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # else the loader would draw its seed from the run's random state
        )
        micro: list[dict[str, Tensor]] = []
        for batch in loader:
            micro.append(batch)
            if len(micro) * size * shards == phase.sequences:
                yield step, micro
                micro, step = [], step + 1


def _leave_signals(worker: int) -> None:
    """Ignores Ctrl-C and SIGTERM, which may reach all processes: batches must keep coming until the loop has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def step_totals(micro: list[dict[str, Tensor]], division: Division) -> StepTotals:
    """Counts over the micro-batches of all ranks."""
    labels, queries = sum(map(_label_weight, micro)), sum(batch["input_ids"].numel() for batch in micro)
    if division.mesh.size > 1:
        sharing = division.mesh.size // division.shards  # ranks with the same micro-batches
        counts = torch.tensor([labels, queries], dtype=torch.float64, device=division.mesh.device)
        labels, queries = (division.mesh.all_reduce(counts) / sharing).tolist()
    return StepTotals(labels, int(queries))


def _label_weight(batch: dict[str, Tensor]) -> float:
    # NumPy, since so short a sum is not worth waking torch's threads, whose cores the data workers use.
    predicted = batch["labels"].numpy()[:, 1:] != -100
    weights = batch.get("loss_weights")
    return float(predicted.sum() if weights is None else weights.numpy()[:, 1:][predicted].sum(dtype="float64"))
