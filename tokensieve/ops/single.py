"""When a token is alone: in decode on the CPU a layer is a hundred operators too small to be worth their calls.

Legend: N tokens, X whatever belongs to each.
"""

import torch
from torch import Tensor


def plain(x: Tensor) -> bool:
    """Whether `x` is on the CPU, neither traced nor differentiated, nor under autocast: an op may then be called as it is, unregistered."""
    if not x.is_cpu or type(x) is not Tensor:
        return False
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))


def alone(x_NX: Tensor) -> bool:
    """Whether `x` is plain and belongs to a single token.

    Then fewer operators are worth a path of their own, and looking at a value costs nothing.
    """
    return x_NX.shape[0] == 1 and plain(x_NX)
