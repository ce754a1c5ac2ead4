"""The lightning indexer of one layer: queries, one key per token, and head weights for equation (1).

Legend: N tokens, H index heads, D index width. Parameter names are the published checkpoint's.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tokensieve import ops
from tokensieve.config import SparseConfig, UserError
from tokensieve.model.rope import Rotation, rotate_half_split
from tokensieve.ops import quant
from tokensieve.ops.eager import without_autocast


class _RoundStraightThrough(torch.autograd.Function):
    """Hadamard rotation and rounding to E4M3 blocks forward; the gradient passes the rounding and turns back through the rotation."""

    @staticmethod
    def forward(ctx, x: Tensor, scale_format: quant.ScaleFormat) -> Tensor:
        values, scales = quant.quantize_e4m3(quant.hadamard(x), scale_format=scale_format)
        return quant.dequantize_e4m3(values, scales, dtype=x.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return quant.hadamard(grads[0]), None


class Indexer(nn.Module):
    """q_I = wq_b(c_Q), k_I = LayerNorm(wk(h)), w = weights_proj(h) * H**-0.5 * D**-0.5; RoPE on the first dims, half-split.

    `source` is the normalized query latent c_Q, or h itself in a model without one. Inputs are detached by the caller: the indexer learns
    from its own loss only. With index_dtype "fp8", q_I and k_I leave here rounded to E4M3 (power-of-two scales, so that scoring the
    dequantized values has the same bits as scoring E4M3 and scaling afterwards). Source: official demo, class Indexer.
    """

    def __init__(self, config: SparseConfig):
        super().__init__()
        self.heads, self.width, self.rope = config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
        self.fp8 = getattr(config, "index_dtype", "bf16") == "fp8"
        if self.width < self.rope:
            raise UserError(
                f"config.json: index_head_dim {self.width} is smaller than qk_rope_head_dim {self.rope}, which it must contain"
            )
        if self.fp8 and self.width & (self.width - 1):
            raise UserError(
                f"config.json: index_dtype fp8 rotates by a Hadamard matrix: index_head_dim {self.width} must be a power of two"
            )
        self.wq_b = nn.Linear(config.q_lora_rank or config.hidden_size, self.heads * self.width, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.width, bias=False)
        self.k_norm = nn.LayerNorm(self.width, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False, dtype=torch.float32)

    def keys(self, h_ND: Tensor, rotation: Rotation, rounded: bool = True) -> Tensor:
        """k_I (N, D). Not `rounded`: without what index_dtype "fp8" does to it, since the cache that it goes to does the same."""
        k = self.k_norm(self.wk(h_ND)).to(h_ND.dtype)
        return self._finish(k.unsqueeze(1), rotation, rounded).squeeze(1)

    def queries(self, source_NL: Tensor, h_ND: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """q_I (N, H, D) and w (N, H) float32."""
        q = self.wq_b(source_NL).view(-1, self.heads, self.width)
        return self._finish(q, rotation), self._weights(h_ND)

    def e4m3_queries(self, source_NL: Tensor, h_ND: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """The same for keys in quantized pages: q_I (N, H, D) float8_e4m3fn, its scales folded into w (N, H) float32."""
        q = self.wq_b(source_NL).view(-1, self.heads, self.width)
        if len(rotation.half_split) == 2:
            return ops.quantize_queries(q, self._weights(h_ND), *rotation.half_split)
        return ops.quantize_queries(self._rotated(q, rotation), self._weights(h_ND))

    def _weights(self, h_ND: Tensor) -> Tensor:
        with without_autocast(h_ND):
            w = F.linear(h_ND.to(self.weights_proj.weight.dtype), self.weights_proj.weight)
        return w * (self.heads**-0.5 * self.width**-0.5)

    def _rotated(self, x_NHD: Tensor, rotation: Rotation) -> Tensor:
        rotated = rotate_half_split(x_NHD[..., : self.rope], rotation)
        return torch.cat((rotated, x_NHD[..., self.rope :]), dim=-1)

    def _finish(self, x_NHD: Tensor, rotation: Rotation, rounded: bool = True) -> Tensor:
        x = self._rotated(x_NHD, rotation)
        return _RoundStraightThrough.apply(x, "ue8m0") if self.fp8 and rounded else x
