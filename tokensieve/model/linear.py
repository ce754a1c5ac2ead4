"""The weight of a linear layer, or of a replacement for one: an adapter, a hook, a quantized layer.

Legend: I inputs, O outputs.
"""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from tokensieve.config import UserError

# Allowed deviation from a linear layer, relative to its largest output: the rounding of the products compared.
LINEAR_WITHIN = {torch.float32: 1e-4, torch.float64: 1e-10}
LINEAR_WITHIN_HALF = 3e-2


def effective_weight(layer: Any, name: str) -> Tensor:
    """The matrix (O, I) that `layer` multiplies by, with gradients to all tensors that it is made of.

    A plain nn.Linear has it as `weight`. Any other layer (a LoRA adapter, a hook, quantized weights) is applied to the
    identity, which is exact up to rounding if the layer is linear. UserError if it is not: a bias, dropout in an
    adapter, a hook that adds or clips.
    """
    if is_plain(layer):
        return layer.weight
    weight = next((p for p in layer.parameters() if p.is_floating_point()), None)
    width = layer.in_features
    dtype = weight.dtype if weight is not None and weight.element_size() > 1 else torch.float32
    device = weight.device if weight is not None else next(layer.buffers()).device
    probe = torch.linspace(-1, 1, width, dtype=dtype, device=device)
    rows = layer(torch.cat((torch.eye(width, dtype=dtype, device=device), probe[None], torch.zeros_like(probe)[None])))
    matrix, combination, offset = rows[:width], rows[width], rows[width + 1]
    with torch.no_grad():
        deviation = torch.maximum((combination - probe.to(matrix.dtype) @ matrix).abs().amax(), offset.abs().amax())
        tolerance = LINEAR_WITHIN.get(matrix.dtype, LINEAR_WITHIN_HALF) * max(1.0, width**0.5 / 8)
        linear = bool(deviation <= tolerance * combination.abs().amax().clamp_min(matrix.abs().amax()))
    if not linear:
        raise UserError(
            f"{name} is {type(layer).__name__} and not linear (dropout, a bias, or a hook that is not), and the sparse "
            "form of latent attention absorbs it as a matrix; set the adapter's dropout to 0, or leave this layer out "
            "of it"
        )
    return matrix.T


def is_plain(layer: Any) -> bool:
    """Whether the layer is nothing but its weight: no bias, no hook, no subclass of nn.Linear or of its weight."""
    if type(layer) is not nn.Linear or layer.bias is not None or "forward" in layer.__dict__:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    return type(layer.weight) in (nn.Parameter, Tensor)
