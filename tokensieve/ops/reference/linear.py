"""Products with weights in FP8 blocks: both sides rounded to E4M3 in blocks of 128, multiplied, and summed in float32.

Legend: N rows, E weights, M outputs, K inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokensieve.ops import quant


def block_linear(x_NK: Tensor, weight_EMK: Tensor, scale: Tensor, ends_E: Tensor | None, gated: bool) -> Tensor:
    M = weight_EMK.shape[1]
    x = x_NK
    if gated:
        gate, up = x.chunk(2, -1)
        x = F.silu(gate) * up
    rounded = quant.dequantize_e4m3(*quant.quantize_e4m3(x, scale_format="ue8m0"))
    out = x.new_zeros(x.shape[0], M)
    begin = 0
    for expert, end in enumerate([x.shape[0]] if ends_E is None else ends_E.tolist()):
        if end > begin:
            weight = quant.dequantize_weight(weight_EMK[expert], scale[expert], dtype=torch.float32)
            out[begin:end] = F.linear(rounded[begin:end], weight).to(x.dtype)
        begin = end
    return out
