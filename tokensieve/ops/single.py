"""When a token is alone: in decode on the CPU a layer is a hundred operators too small to be worth their calls.

Legend: N tokens, X whatever belongs to each.
"""

import torch
from torch import Tensor


def alone(x_NX: Tensor) -> bool:
    """Whether `x` belongs to a single token on the CPU, neither traced nor differentiated, nor under autocast.

    Then fewer operators are worth a path of their own, and looking at a value costs nothing.
    """
    if x_NX.shape[0] != 1 or not x_NX.is_cpu or type(x_NX) is not Tensor:
        return False
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
