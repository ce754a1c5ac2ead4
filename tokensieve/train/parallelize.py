"""One model on several ranks in training, applied from outside of it: FSDP2, context and expert parallelism.

The ranks form one DeviceMesh with the axes "shard" and "context". Ranks of the same shard share the tokens of their
sequences (`tokensieve.model.gathered`); different shards read different micro-batches of a step. Parameters, gradients
and the optimizer's moments are sharded over all ranks. Every rank's losses are its shares of the means over the whole
step, so gradients are summed over the ranks and never averaged. Parameters are float32, and gathered in the dtype in
which products read them (`tokensieve.train.precision`).

Experts may have a mesh of their own, of the same ranks, with the axes "expert_shard" and "experts". Ranks of the same
expert shard divide the experts (`tokensieve.model.expert_group`), and FSDP gathers the matrices of a rank's experts
over the other axis alone. Tensor parallelism would be a further axis.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tokensieve import checkpoint, cost
from tokensieve.config import TrainConfig, UserError
from tokensieve.cost.division import experts_refusal, refusal
from tokensieve.cost.train_memory import Ranks
from tokensieve.families import ModelConfig
from tokensieve.machine import rank_info
from tokensieve.mesh import Mesh
from tokensieve.model import DecoderForCausalLM
from tokensieve.model.expert_group import ExpertGroup
from tokensieve.model.files import came_from, fill
from tokensieve.model.gathered import CHUNK, ContextGroup
from tokensieve.model.moe import Experts
from tokensieve.model.transformer import DecoderLayer
from tokensieve.train import precision

# What PEFT adds to the name of a tensor that it wraps, or of which a copy learns.
WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save\.default)\b")


@dataclass(frozen=True)
class Division:
    """The division of a run's work over the ranks, seen from one of them.

    context: the ranks that share this rank's sequences; None: it has them alone. shard: index of this rank's shard,
    which reads the micro-batches shard, shard + shards, ... of a step. experts: all ranks, with the axes of the
    experts; None: experts are sharded as everything else. offload: whether this rank's part of the parameters, and with
    it gradients and moments, is in the host's memory.
    """

    mesh: Mesh
    context: ContextGroup | None = None
    shard: int = 0
    shards: int = 1
    experts: DeviceMesh | None = None
    offload: bool = False

    @property
    def policy(self) -> OffloadPolicy:
        """FSDP's policy for all parameters."""
        return CPUOffloadPolicy(pin_memory=self.mesh.device.type == "cuda") if self.offload else OffloadPolicy()


def divide(config: TrainConfig, mesh: Mesh) -> Division:
    """The division of a run over the ranks of `mesh`.

    UserError for settings that do not divide over so many ranks.
    """
    R, X = config.context_parallel, config.expert_parallel
    ranks = Ranks(mesh.size, R, X)
    if (reason := refusal(config, ranks)) is not None:
        raise UserError(reason)
    if mesh.size == 1:
        return Division(mesh)
    if config.offload and mesh.device.type == "cpu":
        raise UserError("offload is true, and the ranks train on the CPU, whose memory is the host's; leave it out")
    axes = mesh.axes(shard=ranks.shards, context=R)
    shard, rank = axes.get_local_rank("shard"), axes.get_local_rank("context")
    context = None
    if R > 1:
        # Chunks hold whole blocks of queries, so the same queries have a KL as in one process.
        context = ContextGroup(rank, R, axes.get_group("context"), math.lcm(CHUNK, config.kl_queries))
    experts = mesh.axes(expert_shard=mesh.size // X, experts=X) if X > 1 else None
    return Division(mesh, context, shard, ranks.shards, experts, config.offload)


def check_model(config: TrainConfig, model_config: Any, mesh: Mesh) -> None:
    """UserError if the ranks cannot divide the experts, or hold their parts of the weights, gradients and moments.

    Where these are in the host's memory, the copy of weights and moments counts that it keeps while a checkpoint is
    written.
    """
    ranks = Ranks(mesh.size, config.context_parallel, config.expert_parallel)
    if (reason := experts_refusal(cost.shape_of(model_config), ranks)) is not None:
        raise UserError(reason)
    host = config.offload or mesh.device.type == "cpu"
    needed = cost.run_estimate(model_config, config, 1.0)
    held, copied = needed.weight_bytes, needed.weight_bytes
    if config.lora is None:  # what adapters need besides is little, and their copy is the merged model
        held += needed.gradient_bytes + needed.optimizer_bytes
        copied += needed.optimizer_bytes
    if host:
        there, what = psutil.virtual_memory().total // rank_info().local_size, "a rank's share of the memory"
        held += copied
    else:
        there, what = torch.cuda.get_device_properties(mesh.device).total_memory, "a device"
    if held > there * mesh.size:
        note = ", with the copy of a checkpoint," if host else ""
        if host:  # further ranks on these machines would share the same memory
            least = math.ceil(held / (there * rank_info().local_size))
            remedy = f"start ranks on at least {least} such machines"
        else:
            together = math.lcm(config.context_parallel, config.expert_parallel)
            remedy = f"start at least {math.ceil(held / there / together) * together} ranks, or set offload=true"
        raise UserError(
            f"{mesh.size} ranks cannot hold the model: its weights, gradients and moments{note} are "
            f"{held / 2**30:.1f} GiB, and {what} is {there / 2**30:.1f} GiB; {remedy}"
        )


class Root(nn.Module):
    """A model within whose forward pass everything runs that uses it.

    FSDP gathers embedding and head, which no layer holds, for the forward pass of a root. A second one around it
    gathers `exact`: modules of the model whose parameters have another dtype, and which are small.
    """

    def __init__(self, model: "DecoderForCausalLM | Root", exact: Iterable[nn.Module] = ()):
        super().__init__()
        self.model, self.exact = model, nn.ModuleList(exact)

    def forward(self, compute: Callable[..., Any], *args: Any) -> Any:
        """compute(model, *args). FSDP sees the tensors of its result in tuples, lists and dicts."""
        return self.model(compute, *args) if isinstance(self.model, Root) else compute(self.model, *args)


def shard(model: DecoderForCausalLM, division: Division) -> Root:
    """The root of a model, whose parameters are sharded over all ranks, if there are several."""
    if division.mesh.size == 1:
        return Root(model)
    ranks = division.mesh.axes(ranks=division.mesh.size)
    policy = precision.gather_policy(precision.product_dtype(division.mesh.device))
    if division.experts is not None:
        division.experts._flatten("expert_ranks")  # norms are then summed in one operation
        for module in model.modules():
            if isinstance(module, Experts):
                _shard_experts(module, division.experts, mp_policy=policy, offload_policy=division.policy)
    exact = [*precision.exact_modules(model)]
    apart = {parameter for module in exact for parameter in module.parameters()}
    # A layer that borrows an indexer in warm-up reads its parameters, so both are gathered together.
    unit: list[nn.Module] = []
    for layer in model.model.layers:
        unit.append(layer)
        if not cast(DecoderLayer, layer).self_attn.lends:
            fully_shard(unit, mesh=ranks, mp_policy=policy, offload_policy=division.policy, ignored_params=apart)
            unit = []
    inner = Root(model)
    fully_shard(
        inner,
        mesh=ranks,
        reshard_after_forward=False,
        mp_policy=policy,
        offload_policy=division.policy,
        ignored_params=apart,
    )
    root = Root(inner, exact)
    fully_shard(root, mesh=ranks, mp_policy=precision.gather_policy(None), offload_policy=division.policy)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return root


def gather_forward_only(root: Root) -> None:
    """Gathers layers in the forward pass alone, for a warm-up, whose backward pass reads no parameter."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_unshard_in_backward(False)


def _shard_experts(module: Experts, axes: DeviceMesh, **policies: Any) -> None:
    """Leaves each rank its experts, and of their matrices its rows. Few ranks have as many experts as share one.

    policies: of FSDP.
    """
    experts = axes["experts"]
    module.group = ExpertGroup(experts.size(), experts.get_group())
    for name, parameter in list(module.named_parameters()):
        own = distribute_tensor(parameter.detach(), experts, [Shard(0)], src_data_rank=None)
        setattr(module, name, nn.Parameter(own, parameter.requires_grad))
    fully_shard(module, mesh=axes["expert_shard"], shard_placement_fn=lambda parameter: Shard(1), **policies)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank. All ranks call it for the same tensors in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def experts_of(tensor: Tensor) -> DeviceMesh | None:
    """The ranks that divide a tensor's experts, if it is one of divided experts."""
    names = tensor.device_mesh.mesh_dim_names if isinstance(tensor, DTensor) else None
    return tensor.device_mesh["experts"] if isinstance(tensor, DTensor) and "experts" in (names or ()) else None


def blocks(tensor: Tensor) -> Iterator[Tensor]:
    """All of a tensor's rows on every rank, in their order: divided experts a rank's after the other, and else at once.

    All ranks call it for the same tensors in the same order.
    """
    experts = experts_of(tensor)
    if experts is None or not isinstance(tensor, DTensor):
        yield whole(tensor)
        return
    own = tensor.redistribute(placements=[Replicate(), Shard(0)]).to_local()
    for rank in range(experts.size()):
        block = own if rank == experts.get_local_rank() else torch.empty_like(own)
        torch.distributed.broadcast(block, group=experts.get_group(), group_src=rank)
        yield block


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The mesh of a sharded tensor. PyTorch does not compute with tensors of several meshes at once."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def own_part(shape: torch.Size, like: Tensor) -> tuple[slice, ...]:
    """The part of a whole tensor that this rank holds, if it is divided as `like`, a slice for each dimension."""
    if not isinstance(like, DTensor):
        return tuple(slice(0, size) for size in shape)
    sizes, starts = compute_local_shape_and_global_offset(shape, like.device_mesh, like.placements)
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def empty_model(config: ModelConfig) -> DecoderForCausalLM:
    """A model without its tensors, for `shard` and then `read_parts`."""
    with torch.device("meta"):
        return DecoderForCausalLM(config)


def read_parts(
    model: DecoderForCausalLM, folder: Path, division: Division, adapters: Iterable[tuple[str, Tensor]] = ()
) -> None:
    """Fills a sharded model with this rank's parts of a checkpoint, in float32. No other parts are read.

    adapters: whole tensors of the model that the checkpoint does not have. Besides what the rank keeps it holds one
    tensor's part at a time. UserError as `tokensieve.load`.
    """
    device = division.mesh.device
    home = torch.device("cpu") if division.offload else device
    like = model.state_dict()
    places: dict[str, list[str]] = {}  # name in the checkpoint -> names in the model
    for name in like:
        places.setdefault(WRAPPED.sub("", name), []).append(name)
    parts = {name: own_part(like[names[0]].shape, like[names[0]]) for name, names in places.items()}

    def part(name: str, own: Tensor) -> Tensor:
        target = like[name]
        if not isinstance(target, DTensor):
            return own.to(device, copy=True, memory_format=torch.contiguous_format)
        # `DTensor.from_local` would move an offloaded part to the device of the mesh.
        kept = cast(DTensor, torch.empty_like(target, dtype=own.dtype, device=home))
        kept.to_local().copy_(own)
        return kept

    def own_tensors() -> Iterator[tuple[str, Tensor]]:
        read = checkpoint.load_tensors(folder, model.config, torch.float32, rows=lambda name: parts[name][0])
        for name, rows in read:
            for place in places[name]:
                yield place, part(place, rows[(slice(None), *parts[name][1:])])
        for name, tensor in adapters:
            yield name, part(name, tensor[own_part(tensor.shape, like[name])])

    fill(model, own_tensors())
    model.extras = checkpoint.mtp_tensors(folder, model.config)
    came_from(model, folder)


def clip(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scales the gradients down to the norm `limit`, if they are longer. Returns their norm () over all ranks."""
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_mesh.setdefault(mesh_of(parameter), []).append(parameter)
    groups = by_mesh.values()
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    norm = torch.nn.utils.get_total_norm([whole(norm) for norm in norms])
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm
