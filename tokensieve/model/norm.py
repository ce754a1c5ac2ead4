"""RMSNorm.

Legend: N tokens, D width.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tokensieve.ops.eager import is_single_token


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_ND: Tensor) -> Tensor:
        weight = self.weight
        if is_single_token(x_ND) and x_ND.dtype == weight.dtype == torch.float32:  # half the operators
            x_D = x_ND[0]
            return (x_ND * (float(x_D.dot(x_D)) / x_D.shape[0] + self.eps) ** -0.5).mul_(weight)
        return F.rms_norm(x_ND, weight.shape, weight.to(x_ND.dtype), self.eps).to(x_ND.dtype)
