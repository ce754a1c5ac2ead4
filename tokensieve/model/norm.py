"""RMSNorm.

Legend: N tokens, D width.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tokensieve.ops.single import plain


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_ND: Tensor) -> Tensor:
        weight = self.weight
        if plain(x_ND) and x_ND.dtype == weight.dtype == torch.float32:  # half the time of the library's, in decode
            if x_ND.shape[0] == 1:
                x_D = x_ND[0]
                return (x_ND * (float(x_D.dot(x_D)) / x_D.shape[0] + self.eps) ** -0.5).mul_(weight)
            return (x_ND * x_ND.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()).mul_(weight)
        return F.rms_norm(x_ND, weight.shape, weight.to(x_ND.dtype), self.eps).to(x_ND.dtype)
