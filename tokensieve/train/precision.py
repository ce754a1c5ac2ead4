"""Precision of training: parameters and moments in float32, and on a GPU products in bfloat16.

Autocast rounds the operands of a product. On several ranks FSDP has rounded them before it gathers them, so half the
bytes are sent, and a layer's weights are on a rank once. Rounded are the same numbers, so results are those of one
process. Gradients are made in bfloat16 either way, and summed over micro-batches and ranks in float32.

Two sums within a micro-batch are in bfloat16, since autograd adds gradients in the dtype of what was read. The gradient
of the head is one over pieces of `cost.head_rows` tokens (`tokensieve/train/stage.py`): float32 would take 8 bytes more
for each number of the head. On several ranks that of an indexer which layers share is one over these layers, which
autocast does not do in one process.
"""

from collections.abc import Iterator

import torch
import torch.nn as nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from tokensieve.model.indexer import Indexer
from tokensieve.model.moe import Router


def product_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of products of float32 parameters on this device; None: their own."""
    return torch.bfloat16 if device.type == "cuda" else None


def gather_policy(dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    """FSDP's policy for parameters that are read in `dtype`. Inputs stay as they are: rotations, weights of the KL."""
    return MixedPrecisionPolicy(dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False)


def exact_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose parameters are read in float32: routers, and the head weights and the key norm of indexers.

    They decide which experts and which keys are chosen.
    """
    for module in model.modules():
        if isinstance(module, Router):
            yield module
        elif isinstance(module, Indexer):
            yield from (module.weights_proj, module.k_norm)
