"""Layers that hold the FP8 blocks of a checkpoint as stored, for inference.

They take half the memory, and a token reads half the bytes.

Legend: N tokens, E experts, D hidden width, I expert width, M outputs, K inputs.
"""

import math

import torch
import torch.nn as nn
from torch import Tensor

from tokensieve import ops
from tokensieve.model.moe import Experts
from tokensieve.ops.quant import SCALE_BLOCK


def pays(device: torch.device) -> bool:
    """Whether this device multiplies FP8: a Hopper GPU does. Elsewhere blocks are multiplied out when they are read."""
    hopper = device.type == "cuda" and torch.version.hip is None
    return hopper and torch.cuda.get_device_capability(device)[0] == 9


def _blocks(*shape: int) -> tuple[nn.Parameter, nn.Parameter]:
    """E4M3 numbers, and their scales, one per block of 128 x 128."""
    *experts, M, K = shape
    scales = torch.empty(*experts, math.ceil(M / SCALE_BLOCK), K // SCALE_BLOCK)
    numbers = torch.empty(shape, dtype=torch.float8_e4m3fn)
    return nn.Parameter(numbers, requires_grad=False), nn.Parameter(scales, requires_grad=False)


class BlockLinear(nn.Module):
    """A linear layer without a bias; weight (M, K) E4M3 and weight_scale_inv, named as in the published checkpoint."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight, self.weight_scale_inv = _blocks(outputs, inputs)

    def forward(self, x_NK: Tensor) -> Tensor:
        return ops.block_linear(x_NK, self.weight[None], self.weight_scale_inv[None])


class BlockExperts(Experts):
    def __init__(self, experts: int, hidden: int, width: int):
        nn.Module.__init__(self)
        self.gate_up_proj, self.gate_up_proj_scale_inv = _blocks(experts, 2 * width, hidden)
        self.down_proj, self.down_proj_scale_inv = _blocks(experts, hidden, width)

    def few_tokens(self, x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        return self(x_ND, chosen_NK, weights_NK)[0]

    def one_token(self, x_1D: Tensor, chosen_1K: Tensor, weights_1K: Tensor) -> Tensor:
        return self(x_1D, chosen_1K, weights_1K)[0]

    def _products(self, x: Tensor, ends_E: Tensor, counts_E: Tensor) -> Tensor:
        ends = ends_E.to(torch.int32) if len(ends_E) > 1 else None
        inner = ops.block_linear(x, self.gate_up_proj, self.gate_up_proj_scale_inv, ends)
        return ops.block_linear(inner, self.down_proj, self.down_proj_scale_inv, ends, gated=True)


def holdable(model: nn.Module, stored: set[str]) -> set[str]:
    """Names of parameters whose layers can hold FP8 blocks, out of those that a checkpoint stores in blocks (`stored`).

    kv_b_proj cannot hold them, because decoding absorbs its halves into queries and outputs, head by head. Nor can the
    indexer's weights_proj, which is kept in float32.
    """
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.bias is None and module.in_features % SCALE_BLOCK == 0:
            names |= {f"{name}.weight"} if not name.endswith(("kv_b_proj", "weights_proj")) else set()
        elif isinstance(module, Experts):
            hidden, width = module.down_proj.shape[1:]
            both = {f"{name}.gate_up_proj", f"{name}.down_proj"}
            names |= both if hidden % SCALE_BLOCK == 0 == width % SCALE_BLOCK and both <= stored else set()
    return names & stored


def hold(model: nn.Module, names: set[str]) -> None:
    """Replaces the layers whose parameters are named by layers that hold blocks."""
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if f"{name}.weight" in names and isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent), child, BlockLinear(module.in_features, module.out_features))
        elif f"{name}.down_proj" in names and isinstance(module, Experts):
            experts, hidden, width = module.down_proj.shape
            setattr(model.get_submodule(parent), child, BlockExperts(experts, hidden, width))


def holds(model: nn.Module) -> bool:
    return any(isinstance(module, BlockLinear | BlockExperts) for module in model.modules())
