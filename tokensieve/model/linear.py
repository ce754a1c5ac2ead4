"""The weight of a linear layer, or of a replacement for one: an adapter, a hook, a quantized layer.

Legend: I inputs, O outputs.
"""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from tokensieve.config import UserError

# Allowed deviation from a linear layer, relative to its largest output: the rounding of the products compared. That
# of float32 grows with the width that is summed over; in half precision the rounding of each result outweighs it.
LINEAR_WITHIN = {torch.float32: 1e-4, torch.float64: 1e-10}
LINEAR_WITHIN_HALF = 2e-2


def effective_weight(layer: Any, name: str, like: Tensor) -> Tensor:
    """The matrix (O, I) that `layer` multiplies inputs of the dtype and device of `like` by, with its gradients.

    A plain nn.Linear has it as `weight`. Any other layer (a LoRA adapter, a hook, quantized weights) is applied to the
    identity, which is exact up to rounding if the layer is linear. UserError if it is not: a bias, dropout in an
    adapter, a hook that adds or clips. While a CUDA graph is recorded no value can be looked at; the pass before it,
    which compiles the kernels, has looked.
    """
    if is_plain(layer):
        return layer.weight
    width = layer.in_features
    probe = torch.linspace(-1, 1, width, dtype=like.dtype, device=like.device)[None]
    identity = torch.eye(width, dtype=like.dtype, device=like.device)
    rows = layer(torch.cat((identity, probe, probe, torch.zeros_like(probe))))
    matrix = rows[:width]
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return matrix.T
    if _drops(layer) or not _is_linear(matrix, probe, *rows[width:].detach()):
        raise UserError(
            f"{name} is {type(layer).__name__} and not linear (dropout, a bias, or a hook that is not), and the sparse "
            "form of latent attention absorbs it as a matrix; set the adapter's dropout to 0, or leave this layer out "
            "of it"
        )
    return matrix.T


def _drops(layer: Any) -> bool:
    """Whether the layer has dropout that acts now. An adapter that still is zero would hide it from the products."""
    return any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in layer.modules())


@torch.no_grad()
def _is_linear(matrix_IO: Tensor, probe_1I: Tensor, once_O: Tensor, again_O: Tensor, offset_O: Tensor) -> bool:
    """Whether a layer that made `matrix` of the identity combines its rows, twice the same, and adds nothing."""
    width, wide = probe_1I.shape[1], torch.promote_types(matrix_IO.dtype, torch.float32)
    expected = (probe_1I.to(wide) @ matrix_IO.to(wide))[0]
    tolerance = LINEAR_WITHIN_HALF
    if matrix_IO.dtype in LINEAR_WITHIN:
        tolerance = LINEAR_WITHIN[matrix_IO.dtype] * max(1.0, width**0.5 / 8)
    largest = torch.maximum(expected.abs().amax(), matrix_IO.abs().amax())
    close = (once_O - expected).abs().amax() <= tolerance * largest
    return bool(close & (once_O == again_O).all() & (offset_O == 0).all())


def is_plain(layer: Any) -> bool:
    """Whether the layer is nothing but its weight: no bias, no hook, no subclass of nn.Linear or of its weight."""
    if type(layer) is not nn.Linear or layer.bias is not None or "forward" in layer.__dict__:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    return type(layer.weight) in (nn.Parameter, Tensor)
