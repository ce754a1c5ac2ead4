"""The processes of one job, as torchrun starts them: the device of each, and the collectives between them.

The engine builds on it, and training. All ranks call the same methods in the same order. Training arranges them in
grids, by these axes; the engine has no grid, and divides a model over all ranks.

    ranks         all of them: parameters, gradients and moments are sharded over them
    shard         groups that read different sequences of a step
    context       ranks that share the tokens of a sequence
    expert_shard  ranks that share the matrices of their experts
    experts       ranks that divide the routed experts, and exchange tokens
"""

import functools
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tokensieve.config import UserError
from tokensieve.machine import choose_device, rank_info

T = TypeVar("T")

# Time after which a rank that waits for another gives up. The slowest task that ranks do alone is to read a checkpoint.
TIMEOUT = timedelta(minutes=30)
LONGEST_ERROR = 4096  # bytes of UTF-8


class OneRankError(UserError):
    """Bad input that one rank meets while the others go on. It prints the message itself, and they end with it."""

    alone = True


@dataclass(frozen=True)
class Mesh:
    """The ranks of one job, seen from one of them.

    rank: index of this rank.
    size: number of ranks.
    device: device of this rank.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def axes(self, **sizes: int) -> DeviceMesh:
        """The ranks as a grid with these axes, the last of which changes fastest from rank to rank.

        All ranks call it together.
        """
        return init_device_mesh(self.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of x over all ranks, of the same shape and dtype. x itself may be overwritten."""
        if self.device.type == "cuda":
            dist.all_reduce(x)
            return x
        # Summed in the order of the ranks. In gloo's own sum the order depends on a number's position in the tensor,
        # and so on the rows beside it.
        return functools.reduce(torch.add, self.all_gather(x))

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """x of every rank, in order of the ranks. All must have the same shape and dtype."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x)
        return parts

    def broadcast(self, values: list[int]) -> list[int]:
        """Values of rank 0. All ranks pass lists of equal length."""
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.broadcast(tensor, 0)
        return tensor.tolist()

    def all_reduce_min(self, value: int) -> int:
        """Minimum of `value` over all ranks."""
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def agree(self, make: Callable[[], T]) -> T:
        """Result of `make` on this rank, returned once `make` has returned on all ranks.

        If `make` raises UserError on any rank, all ranks raise it. If it raises on several, all raise the one of the
        lowest rank, cut to `LONGEST_ERROR` bytes.
        """
        if self.size == 1:
            return make()
        try:
            results, error = [make()], b""
        except UserError as failure:
            results, error = [], str(failure).encode()[:LONGEST_ERROR]
        message = torch.zeros(LONGEST_ERROR, dtype=torch.uint8)
        message[: len(error)] = torch.tensor(list(error), dtype=torch.uint8)
        for part in self.all_gather(message):
            if text := bytes(part.tolist()).rstrip(b"\0"):
                raise UserError(text.decode(errors="replace"))
        return results[0]

    def leader_first(self, make: Callable[[], T]) -> T:
        """As `agree`, with `make` called on the other ranks once it has returned on rank 0, which may write files."""
        done = self.agree(lambda: [make()] if self.leads else [])
        return self.agree(lambda: done[0] if done else make())

    def check_same(self, what: str, text: str) -> None:
        """UserError, on all ranks, if the text is not the same on all of them. what: the text's content."""
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if self.size > 1 and len({bytes(part.tolist()) for part in self.all_gather(torch.tensor([*digest]))}) > 1:
            raise UserError(f"the ranks differ in {what}; start all of them with the same")

    def lone_error(self, text: str) -> UserError:
        """The error of something that this rank meets, and that the others, if there are any, may not."""
        return OneRankError(text) if self.size > 1 else UserError(text)

    def any(self, value: bool) -> bool:
        """Whether `value` is true on any rank."""
        return value if self.size == 1 else not self.all_reduce_min(not value)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within the block a rank that loses another one ends with status 1, since what it waits for never comes."""
        try:
            yield
        except RuntimeError as error:
            # gloo raises a plain RuntimeError
            if self.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            print(f"tokensieve: rank {self.rank} ends, since another rank has ended or hangs", file=sys.stderr)
            sys.exit(1)


def check_restarts(environment: Mapping[str, str]) -> None:
    """UserError if torchrun may start the ranks again, and then they could not find each other.

    By default they meet in a store that outlives them. A rank that comes back may read there the address of a process
    that has ended (https://github.com/pytorch/pytorch/issues/135712).
    """
    if int(environment.get("TORCHELASTIC_MAX_RESTARTS", 0)) and environment["TORCHELASTIC_USE_AGENT_STORE"] == "True":
        raise UserError(
            "ranks that torchrun starts again may not find each other; start it with --standalone (on several machines "
            "with --rdzv-backend c10d) and with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, or without "
            "--max-restarts"
        )


@contextmanager
def join_mesh(device: str = "auto") -> Iterator[Mesh]:
    """Mesh of the ranks that torchrun started, or of this process alone, as a context manager.

    device: device as commands take it.

    Raises UserError, on every rank, if there are fewer GPUs than ranks, and if torchrun could not start them again.
    """
    info, target = rank_info(), torch.device(choose_device(device))
    if info.size == 1:
        yield Mesh(0, 1, target)
        return
    check_restarts(os.environ)
    if target.type == "cuda":
        if info.local_size > (gpus := torch.cuda.device_count()):
            raise UserError(f"--nproc-per-node {info.local_size} needs as many GPUs, and this machine has {gpus}")
        target = torch.device("cuda", info.local_rank)
        torch.cuda.set_device(target)
    # gloo beside nccl: messages between two steps are tensors on the processor.
    dist.init_process_group("cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo", timeout=TIMEOUT)
    if info.rank:
        logging.getLogger("tokensieve").setLevel(logging.ERROR)  # rank 0 logs the same
    yield Mesh(info.rank, info.size, target)
    dist.destroy_process_group()
