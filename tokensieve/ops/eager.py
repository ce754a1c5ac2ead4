"""How ops and layers run without torch.compile: with autocast off, and on shortcuts for one-token decode on the CPU.

In that decode a layer is a hundred small operators, and calling them dominates.

Legend: N tokens, X any further axes.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which autocast is off on the device of `x`.

    Nothing is entered if it is off already, which is what decode can afford.
    """
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def can_skip_registry(x: Tensor) -> bool:
    """Whether an op on `x` may be called without PyTorch's registry.

    `x` is on the CPU then, neither traced nor differentiated, nor under autocast.
    """
    if not x.is_cpu or type(x) is not Tensor:
        return False
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))


def is_single_token(x_NX: Tensor) -> bool:
    """Whether `x` belongs to one token and `can_skip_registry`.

    Then a path with fewer operators is worth having, and looking at a value costs nothing.
    """
    return x_NX.shape[0] == 1 and can_skip_registry(x_NX)
