"""The lightning indexer of one layer: queries, one key per token, and head weights for equation (1).

Legend: N tokens, H index heads, D index width. Parameter names are the published checkpoint's.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
from torch import Tensor

from tokensieve import ops
from tokensieve.config import UserError
from tokensieve.families import ModelConfig, family_of
from tokensieve.model.rope import Rotation, Rows, Tables, rotate_half_split, rotate_interleaved, taken
from tokensieve.ops import quant
from tokensieve.ops.eager import without_autocast


class _RoundStraightThrough(torch.autograd.Function):
    """Hadamard rotation, then rounding to E4M3 blocks. The gradient skips the rounding and is rotated back."""

    @staticmethod
    def forward(ctx, x: Tensor, scale_format: quant.ScaleFormat) -> Tensor:
        values, scales = quant.quantize_e4m3(quant.hadamard(x), scale_format=scale_format)
        return quant.dequantize_e4m3(values, scales, dtype=x.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return quant.hadamard(grads[0]), None


class Indexer(nn.Module):
    """q_I = wq_b(c_Q), k_I = LayerNorm(wk(h)), w = weights_proj(h) * H**-0.5 * D**-0.5.

    RoPE acts on the first dims of q_I and k_I, half-split (interleaved in GLM-5).

    `source` is the normalized query latent c_Q, or h itself in a model without one. Inputs are detached by the caller:
    the indexer learns from its own loss only. With index_dtype "fp8", the returned q_I and k_I are rounded to E4M3.
    Their scales are powers of two, so that scoring the dequantized values has the same bits as scoring E4M3 and scaling
    afterwards. Source: official demo, class Indexer.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        family = family_of(config)
        self.heads, self.width, self.rope = config.index_n_heads, config.index_head_dim, family.index_rope(config)
        self.interleaved = family.index_interleaved
        self.fp8 = getattr(config, "index_dtype", "bf16") == "fp8"
        if self.width < self.rope:
            raise UserError(
                f"config.json: index_head_dim {self.width} is smaller than {family.index_rope_field} {self.rope}, "
                "which it must contain"
            )
        if self.fp8 and self.width & (self.width - 1):
            raise UserError(
                f"config.json: index_dtype fp8 rotates by a Hadamard matrix: index_head_dim {self.width} "
                "must be a power of two"
            )
        self.wq_b = nn.Linear(family.index_source(config), self.heads * self.width, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.width, bias=False)
        self.k_norm = nn.LayerNorm(self.width, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False, dtype=torch.float32)

    def keys(self, h_ND: Tensor, rotation: Rotation, rounded: bool = True) -> Tensor:
        """k_I (N, D). rounded: whether index_dtype "fp8" rounds it here; False if the cache that stores it does."""
        k = self.k_norm(self.wk(h_ND)).to(h_ND.dtype)
        return self._finish(k.unsqueeze(1), rotation.indexer, rounded).squeeze(1)

    def queries(self, source_NL: Tensor, h_ND: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        """q_I (N, H, D) and w (N, H) float32."""
        q = self.wq_b(source_NL).view(-1, self.heads, self.width)
        return self._finish(q, tables), self._weights(h_ND)

    def e4m3_queries(self, source_NL: Tensor, h_ND: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        """q_I (N, H, D) float8_e4m3fn, for keys in quantized pages; its scales are folded into w (N, H) float32."""
        q = self.wq_b(source_NL).view(-1, self.heads, self.width)
        if len(tables) == 2 and not self.interleaved:
            return ops.quantize_queries(q, self._weights(h_ND), *tables)
        return ops.quantize_queries(self._rotated(q, tables), self._weights(h_ND))

    def _weights(self, h_ND: Tensor) -> Tensor:
        with without_autocast(h_ND):
            w = self.weights_proj(h_ND.to(self._weights_dtype()))
        return w * (self.heads**-0.5 * self.width**-0.5)

    def _weights_dtype(self) -> torch.dtype:
        """The dtype that weights_proj takes; float32 if it is quantized."""
        weight = getattr(self.weights_proj, "weight", None)
        return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.float32

    def _rotated(self, x_NHD: Tensor, tables: Tables) -> Tensor:
        rotate = rotate_interleaved if self.interleaved else rotate_half_split
        return torch.cat((rotate(x_NHD[..., : self.rope], tables), x_NHD[..., self.rope :]), dim=-1)

    def _finish(self, x_NHD: Tensor, tables: Tables, rounded: bool = True) -> Tensor:
        x = self._rotated(x_NHD, tables)
        return _RoundStraightThrough.apply(x, "ue8m0") if self.fp8 and rounded else x


class IndexInputs:
    """Index queries and keys of one layer's pass, computed when needed: a selector without need of them costs nothing.

    Inputs are detached: the indexer learns from its own loss only.
    """

    def __init__(
        self,
        indexer: Indexer,
        source_NL: Tensor,
        h_ND: Tensor,
        rotation: Rotation,
        gather: Callable[[Tensor], Tensor],
    ):
        """gather: of the pass's `Entries`."""
        self._indexer, self._rotation, self._gather = indexer, rotation, gather
        self._source, self._h = source_NL.detach(), h_ND.detach()
        self._held: tuple[Tensor, Tensor, Tensor] | None = None

    def parameters(self) -> Iterator[nn.Parameter]:
        """What learns from a loss of these queries and keys."""
        return self._indexer.parameters()

    def keys(self, rounded: bool) -> Tensor:
        """k_I (T, D) of all tokens of this pass."""
        if self._held is not None:
            return self._held[1]
        return self._gather(self._indexer.keys(self._h, self._rotation, rounded))

    def queries(self, rows: Rows, quantized: bool) -> tuple[Tensor, Tensor]:
        """q_I and w of the tokens in `rows`. quantized: E4M3, as `Indexer.e4m3_queries` returns them."""
        if self._held is not None:
            return taken(self._held[0], rows), taken(self._held[2], rows)
        project = self._indexer.e4m3_queries if quantized else self._indexer.queries
        return project(taken(self._source, rows), taken(self._h, rows), self._rotation.index_rows(rows))

    def hold(self) -> tuple[Tensor, Tensor, Tensor]:
        """q_I, k_I and w, computed now and held: if the indexer learns, selection and loss read the same tensors."""
        self._held = None
        q_I, w = self.queries(None, False)
        self._held = q_I, self.keys(True), w
        return self._held
