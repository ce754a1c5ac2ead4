"""Adaptation by LoRA: the trunk's weights are frozen, and PEFT's adapters learn in their place.

The indexers are small and learn whole, as without adapters. PEFT calls such modules `modules_to_save`: it trains a copy
and writes it into the adapter's file, so this file is all that a run has learned.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from tokensieve import cost
from tokensieve.config import LoraConfig, UserError
from tokensieve.cost.division import ADAPTED_EXPERTS
from tokensieve.model import DecoderForCausalLM, Trunk
from tokensieve.model.moe import Experts
from tokensieve.train.learning import is_indexer
from tokensieve.train.parallelize import own_part

log = logging.getLogger("tokensieve")

STEM = "adapter_model"  # PEFT's name, in a checkpoint
TENSORS = f"{STEM}.safetensors"
MISREAD = {"gate_proj", "up_proj", "down_proj"}  # by PEFT, in a model with experts


class _WithoutConfig(nn.Module):
    """The parts of a model under the names that they have in it, without a config that PEFT could find.

    In a model whose config names a mixture of experts, PEFT takes gate_proj, up_proj and down_proj for the experts'
    fused tensors, and leaves out the dense and the shared layers, which have these names.
    """

    def __init__(self, model: DecoderForCausalLM):
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head


@contextmanager
def adapted(
    model: DecoderForCausalLM,
    config: LoraConfig | None,
    seed: int = 0,
    base: str = "",
    indexers: bool = True,
    divided: bool = False,
) -> Iterator[Any]:
    """Within the block adapters learn in place of the trunk's weights; afterwards they are merged into these.

    Yields PEFT's wrapper of the model, or None if `config` is None.

    seed: of the adapters' first weights. base: what adapter_config.json names as the model. indexers: whether they
    learn, whole. divided: whether ranks divide the experts. The model may be empty, and may be filled and sharded
    within the block: `first_weights` are then the caller's to set. All ranks of a sharded model merge together, so one
    whose block fails does not merge.

    UserError, before anything is changed, for targets that the model does not have, for dropout at targets that cannot
    have it, and for targets among divided experts.
    """
    if config is None:
        yield None
        return
    import peft

    learned = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    layers, tensors = targets_of(model.model, config.targets)
    if config.dropout and (tensors or any(name.endswith("kv_b_proj") for name in layers)):
        raise UserError(
            f"lora.dropout is {config.dropout}, and adapters of kv_b_proj and of experts have no input to drop from; "
            "set it to 0, or leave these out of lora.targets"
        )
    if divided and tensors:
        raise UserError(ADAPTED_EXPERTS)
    misread = {name.rpartition(".")[2] for name in layers} & MISREAD
    if not config.merge and misread and any(isinstance(module, Experts) for module in model.modules()):
        log.warning(
            "PEFT by itself would load the adapters of %s into the experts; to merge them, resume with lora.merge=true",
            ", ".join(sorted(misread)),
        )
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank if config.alpha is None else config.alpha,
        lora_dropout=config.dropout,
        target_modules=layers,
        target_parameters=tensors or None,
        modules_to_save=["indexer"] if indexers else None,
    )
    adapter = peft.get_peft_model(_WithoutConfig(model), settings)
    # The layers are in place; from here on the wrapper is one of the model itself, as trainers expect (TRL).
    adapter.base_model.model, adapter.base_model.config = model, model.config
    settings.base_model_name_or_path, settings.task_type = base, "CAUSAL_LM"
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.load_state_dict(dict(first_weights(model, seed)), strict=False)

    def end(merge: bool) -> None:
        if merge:
            _replicate(model)
            adapter.merge_and_unload()
        else:
            adapter.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(learned[name])

    try:
        yield adapter
    except BaseException:
        end(merge=not any(isinstance(parameter, DTensor) for parameter in model.parameters()))
        raise
    end(merge=True)


def first_weights(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """First weights of a model's adapters by name, whole and in float32, distributed as PEFT's own.

    A: uniform within 1 / sqrt(its inputs), from numbers that the seed alone decides. B: zero.
    """
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            weight = torch.zeros(parameter.shape)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=draw)
            yield name, weight


@torch.no_grad()
def _replicate(model: nn.Module) -> None:
    """Gathers the adapters of a sharded model on every rank, since some of their products have no sharded form."""
    for name, module in model.named_modules():
        if ".lora_" in name and isinstance(module, nn.Linear) and isinstance(weight := module.weight, DTensor):
            whole = [Replicate()] * weight.device_mesh.ndim
            module.weight = nn.Parameter(weight.redistribute(placements=whole))


def save_adapter(adapter: Any, folder: Path) -> None:
    """Writes PEFT's two files, adapter_model.safetensors and adapter_config.json."""
    save_file(tensors_of(adapter), folder / TENSORS, metadata={"format": "pt"})
    save_settings(adapter, folder)


def save_settings(adapter: Any, folder: Path) -> None:
    """Writes adapter_config.json alone."""
    adapter.peft_config["default"].save_pretrained(folder)


def restore_adapter(adapter: Any, folder: Path) -> None:
    """Loads the adapter of a checkpoint, of which a rank reads what it keeps.

    UserError, before anything is changed, if it is damaged or of other shapes.
    """
    tensors = tensors_of(adapter)  # those of the model itself
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no dict
            for name in shapes | there:
                if shapes.get(name) != there.get(name):
                    raise UserError(
                        f"{folder / TENSORS}: {name} is {there.get(name, 'missing')}, and the model's is "
                        f"{shapes.get(name, 'missing')}; give the model that the run began with"
                    )
            for name, tensor in tensors.items():
                own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                if own.numel():
                    own.copy_(file.get_slice(name)[own_part(tensor.shape, tensor)])
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / TENSORS}: cannot be read ({error}); remove {folder} to go on before it") from error


def adapters_of(model: nn.Module) -> cost.Adapters | None:
    """The sizes of the model's adapters; None if it has none."""
    if not any(".lora_" in name for name, _ in model.named_parameters()):
        return None
    from peft.tuners.lora import LoraLayer, ParamWrapper

    sizes = {
        layer: sum(x.numel() for part in (layer.lora_A, layer.lora_B) for x in part.parameters())
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
    }
    experts = [layer for layer in sizes if isinstance(layer, ParamWrapper)]
    of_experts = sum(sizes[layer] for layer in experts)
    return cost.Adapters(
        linear=sum(sizes.values()) - of_experts,
        experts=of_experts,
        weights=sum(layer.get_param().numel() for layer in experts),
        layers=len({layer.get_base_layer() for layer in experts}),
        rank=max(rank for layer in sizes for rank in layer.r.values()),
    )


def tensors_of(adapter: Any) -> dict[str, torch.Tensor]:
    """The tensors of adapter_model.safetensors: adapters, and indexers that learn."""
    import peft

    tensors = peft.get_peft_model_state_dict(adapter, save_embedding_layers=False)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def targets_of(trunk: Trunk, targets: str | tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Names of linear layers, and of the experts' fused tensors, that get adapters. UserError for an unknown one."""
    layers = [name for name, m in trunk.named_modules() if isinstance(m, nn.Linear) and not is_indexer(name + ".")]
    experts = [
        f"{name}.{tensor}"
        for name, module in trunk.named_modules()
        if isinstance(module, Experts)
        for tensor, _ in module.named_parameters()
    ]
    names = sorted({name.rpartition(".")[2] for name in layers})
    if targets == "all-linear":
        return names, []
    chosen: tuple[list[str], list[str]] = [], []
    for target in (targets,) if isinstance(targets, str) else targets:
        places = [any(f".{name}".endswith(f".{target}") for name in known) for known in (layers, experts)]
        if not any(places):
            fused = sorted({f"experts.{name.rpartition('.')[2]}" for name in experts})
            raise UserError(
                f"lora.targets: {target!r} names no linear layer of the trunk (the indexers learn whole); use "
                f"all-linear, or of {', '.join(names + fused)}"
            )
        chosen[not places[0]].append(target)
    if not any(chosen):
        raise UserError("lora.targets names no layer; use all-linear, or names of layers")
    return chosen
