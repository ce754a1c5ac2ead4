"""When a token is alone: in decode on the CPU a layer is a hundred operators too small to be worth their call."""

import torch
from torch import Tensor


def alone(x_ND: Tensor) -> bool:
    """Whether these are the states of one token on the CPU that nobody differentiates or traces: then fewer operators count for more
    than fewer reads of a value, which costs nothing there."""
    if x_ND.shape[0] != 1 or x_ND.device.type != "cpu":
        return False
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()
