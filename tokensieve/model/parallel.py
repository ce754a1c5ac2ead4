"""One model on several ranks: tensor and expert parallelism, applied from outside of the model.

A rank is a process with a device of its own, as torchrun starts it. It holds its slice of what `checkpoint.shard_axis` divides (the rows
and columns of its heads and of its part of a feed-forward layer, its rows of the vocabulary), its run of whole experts, and a copy of the
rest, the indexer included. The residual stream is the same on all ranks: what each adds to it is summed before, once after the attention
and once after the feed-forward layer, whose routed and shared experts each rank has summed by itself.

Every rank could select keys, but two that round differently would attend to different ones: each selects for its share of the queries,
and hands over what it chose.

Legend: N tokens, D hidden width, H heads of this rank, V vocabulary, K selected keys, E experts of this rank.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tokensieve import checkpoint
from tokensieve.config import UserError, model_config
from tokensieve.machine import choose_device, place
from tokensieve.model import fp8
from tokensieve.model.attention import Attention
from tokensieve.model.loading import fill, load, model_path
from tokensieve.model.moe import ORDINARY_ROWS, Experts
from tokensieve.model.selection import Peers
from tokensieve.model.transformer import DecoderForCausalLM, DecoderLayer

T = TypeVar("T")

# Until a rank that waits for another gives up. The slowest thing that ranks do by themselves is to read a checkpoint.
PATIENCE = timedelta(minutes=30)
LONGEST_ERROR = 4096  # bytes


@dataclass(frozen=True)
class Ranks(Peers):
    """The ranks that hold one model, seen from one of them. All of them call the same methods in the same order."""

    rank: int
    count: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Of all ranks' x, which may be changed."""
        if self.device.type == "cuda":
            dist.all_reduce(x)
            return x
        # In the order of the ranks: in gloo's own sum it depends on a number's place, and so on the rows beside it.
        return functools.reduce(torch.add, self.gather(x))

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's x, which have one shape."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.count)]
        dist.all_gather(parts, x)
        return parts

    def leaders(self, values: list[int]) -> list[int]:
        """Those of the leader, which are as many."""
        said = torch.tensor(values, dtype=torch.int64)
        dist.broadcast(said, 0)
        return said.tolist()

    def least(self, value: int) -> int:
        held = torch.tensor([value])
        dist.all_reduce(held, dist.ReduceOp.MIN)
        return int(held)

    def together(self, make: Callable[[], T]) -> T:
        """What `make` gives on this rank, once it has given something on all; where it raised UserError on one, all ranks raise that."""
        if self.count == 1:
            return make()
        try:
            made, error = [make()], b""
        except UserError as raised:
            made, error = [], str(raised).encode()[:LONGEST_ERROR]
        said = torch.zeros(LONGEST_ERROR, dtype=torch.uint8)
        said[: len(error)] = torch.tensor(list(error), dtype=torch.uint8)
        for part in self.gather(said):
            if text := bytes(part.tolist()).rstrip(b"\0"):
                raise UserError(text.decode(errors="replace"))
        return made[0]

    # what the attention asks of its peers

    def select(self, queries: int, choose: Callable[[slice], Tensor]) -> Tensor:
        # On a GPU, where bits depend on the batch anyway, shares of any size.
        grain = 1 if self.device.type == "cuda" else ORDINARY_ROWS
        size = min(-(-queries // (self.count * grain)) * grain, queries)
        # All shares have one size, so the last ones may overlap: what an earlier rank chose counts.
        first = [min(rank * size, queries - size) for rank in range(self.count)]
        own = slice(first[self.rank], first[self.rank] + size) if size < queries else slice(None)
        parts = self.gather(choose(own))
        return torch.cat([part[rank * size - first[rank] :] for rank, part in enumerate(parts)])

    def all_heads(self, q_NHD: Tensor) -> Tensor:
        return torch.cat(self.gather(q_NHD), 1)


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone; `device` as a command takes it.

    UserError on every rank where there are fewer GPUs than ranks.
    """
    here, kind = place(), torch.device(choose_device(device))
    if here.ranks == 1:
        yield Ranks(0, 1, kind)
        return
    if kind.type == "cuda":
        if here.local_ranks > (gpus := torch.cuda.device_count()):
            raise UserError(f"--nproc-per-node {here.local_ranks} needs as many GPUs, and this machine has {gpus}")
        kind = torch.device("cuda", here.local_rank)
        torch.cuda.set_device(kind)
    # gloo beside nccl: what ranks say to each other between two steps is on the processor
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo", timeout=PATIENCE)
    if here.rank:
        logging.getLogger("tokensieve").setLevel(logging.ERROR)  # the leader logs the same
    yield Ranks(here.rank, here.ranks, kind)
    dist.destroy_process_group()


def load_rank(name: str | Path, ranks: Ranks, dtype: torch.dtype | None = None) -> DecoderForCausalLM:
    """This rank's part of a model, in evaluation mode; FP8 blocks stay where the device multiplies them.

    It comes out of the rank's own shard where `tokensieve convert` wrote shards for so many ranks, else sliced out of the checkpoint.
    UserError, on all ranks, as `load` raises it and where the ranks do not divide the model.
    """
    return ranks.together(lambda: _load_rank(name, ranks, dtype))


def _load_rank(name: str | Path, ranks: Ranks, dtype: torch.dtype | None) -> DecoderForCausalLM:
    folder, keep_fp8 = model_path(name), fp8.pays(ranks.device)
    shards, own = checkpoint.rank_files(folder), (ranks.rank, ranks.count)
    if ranks.count == 1 and 1 not in shards:
        return load(folder, dtype, ranks.device, keep_fp8=keep_fp8)
    config = model_config(checkpoint.read_config(folder))
    dtype = dtype or (torch.float32 if ranks.device.type == "cpu" else torch.bfloat16)
    with torch.device("meta"):
        model = DecoderForCausalLM(config)
    kept: set[str] = set()
    if ranks.count in shards:
        if keep_fp8:
            kept = fp8.holdable(model, checkpoint.shard_blocks(folder, config, *own))
        tensors = checkpoint.load_shard(folder, config, *own, dtype, kept)
    elif shards:
        held = max(shards)
        raise UserError(
            f"{folder}: holds shards for {held} ranks, and torchrun started {ranks.count}; use --nproc-per-node {held}, or "
            f"convert the checkpoint with --model-parallel {ranks.count}"
        )
    else:
        stored = checkpoint.open_shards(folder)
        checkpoint.check_division(folder, config, stored, ranks.count, whole_blocks=keep_fp8)
        if keep_fp8:
            kept = fp8.holdable(model, checkpoint.block_tensors(folder, config))
        whole = checkpoint.load_tensors(folder, config, dtype, kept)
        tensors = ((name, _slice(name, tensor, ranks)) for name, tensor in whole)
    with torch.device("meta"):
        fp8.hold(model, kept)
    spread(model, ranks)
    fill(model, ((name, tensor.to(ranks.device)) for name, tensor in tensors))
    model.folder = folder
    return model.eval()


def spread(model: DecoderForCausalLM, ranks: Ranks) -> None:
    """Leaves of a whole model what this rank holds, and attaches what the ranks tell each other in a forward pass."""
    if ranks.count == 1:
        return
    trunk, config = model.model, model.config
    trunk.embed_tokens = VocabularyRows(trunk.embed_tokens, ranks)
    for module in list(trunk.modules()):
        if isinstance(module, DecoderLayer):
            for part in (module.self_attn, module.mlp):
                part.register_forward_hook(lambda module, inputs, out: ranks.sum(out))
        elif isinstance(module, Attention):
            module.heads //= ranks.count
            module.peers = ranks
        elif isinstance(module, Experts):
            module.first = ranks.rank * (config.n_routed_experts // ranks.count)
    model.lm_head.register_forward_hook(lambda module, inputs, out: torch.cat(ranks.gather(out), -1))
    sliced: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in sliced:  # a tied head is one with the embedding
            part_of = _slice(name, parameter.detach(), ranks)
            sliced[id(parameter)] = nn.Parameter(part_of, requires_grad=parameter.requires_grad)
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, sliced[id(parameter)])


def _slice(name: str, whole: Tensor, ranks: Ranks) -> Tensor:
    """This rank's part of a tensor in memory; memory of its own, so that the whole is not kept."""
    axis = 0 if ".mlp.experts." in name else checkpoint.shard_axis(name)
    return whole if axis is None else whole.chunk(ranks.count, axis)[ranks.rank].clone()


class VocabularyRows(nn.Embedding):
    """The embedding, of which this rank holds some rows: the others' tokens are zero here, and the sum is that of the one that has them."""

    def __init__(self, embedding: nn.Embedding, ranks: Ranks):
        super().__init__(embedding.num_embeddings // ranks.count, embedding.embedding_dim, device="meta")
        self.weight, self.ranks = embedding.weight, ranks

    def forward(self, ids: Tensor) -> Tensor:
        place = ids - self.ranks.rank * self.num_embeddings
        own = (place >= 0) & (place < self.num_embeddings)
        return self.ranks.sum(F.embedding(place.where(own, 0), self.weight).masked_fill(~own.unsqueeze(-1), 0))
