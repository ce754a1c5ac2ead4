"""The processes that share one job: what torchrun started, their device each, and what they tell one another.

Training and the engine both build on it. All ranks call the same methods in the same order.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.machine import choose_device, rank_info

T = TypeVar("T")

# Until a rank that waits for another gives up. The slowest thing that ranks do by themselves is to read a checkpoint.
TIMEOUT = timedelta(minutes=30)
LONGEST_ERROR = 4096  # bytes


@dataclass(frozen=True)
class Mesh:
    """The ranks of one job, seen from one of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x; x itself may be overwritten."""
        if self.device.type == "cuda":
            dist.all_reduce(x)
            return x
        # In the order of the ranks: in gloo's own sum it depends on a number's place, and so on the rows beside it.
        return functools.reduce(torch.add, self.all_gather(x))

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's x, by rank; all have one shape."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x)
        return parts

    def broadcast(self, values: list[int]) -> list[int]:
        """Rank 0's values; all ranks pass lists of equal length."""
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.broadcast(tensor, 0)
        return tensor.tolist()

    def all_reduce_min(self, value: int) -> int:
        """The smallest of all ranks' values."""
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def agree(self, make: Callable[[], T]) -> T:
        """What `make` returns on this rank, once it has returned on all. If it raises UserError on one rank, all ranks raise that."""
        if self.size == 1:
            return make()
        try:
            results, error = [make()], b""
        except UserError as raised:
            results, error = [], str(raised).encode()[:LONGEST_ERROR]
        message = torch.zeros(LONGEST_ERROR, dtype=torch.uint8)
        message[: len(error)] = torch.tensor(list(error), dtype=torch.uint8)
        for part in self.all_gather(message):
            if text := bytes(part.tolist()).rstrip(b"\0"):
                raise UserError(text.decode(errors="replace"))
        return results[0]


@contextmanager
def join_mesh(device: str = "auto") -> Iterator[Mesh]:
    """The ranks that torchrun started, or this process alone; `device` as a command takes it.

    UserError on every rank if there are fewer GPUs than ranks.
    """
    here, kind = rank_info(), torch.device(choose_device(device))
    if here.size == 1:
        yield Mesh(0, 1, kind)
        return
    if kind.type == "cuda":
        if here.local_size > (gpus := torch.cuda.device_count()):
            raise UserError(f"--nproc-per-node {here.local_size} needs as many GPUs, and this machine has {gpus}")
        kind = torch.device("cuda", here.local_rank)
        torch.cuda.set_device(kind)
    # gloo beside nccl: what ranks say to each other between two steps is on the processor
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo", timeout=TIMEOUT)
    if here.rank:
        logging.getLogger("tokensieve").setLevel(logging.ERROR)  # rank 0 logs the same
    yield Mesh(here.rank, here.size, kind)
    dist.destroy_process_group()
