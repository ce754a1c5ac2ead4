"""When a token is alone: in decode on the CPU a layer is a hundred operators too small to be worth their calls.

Legend: N tokens, D hidden width.
"""

import torch
from torch import Tensor


def alone(x_ND: Tensor) -> bool:
    """Whether these are the states of a single token on the CPU, neither traced nor differentiated.

    Then fewer operators are worth a path of their own, and looking at a value costs nothing.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return x_ND.device.type == "cpu" and x_ND.shape[0] == 1
