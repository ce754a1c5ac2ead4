"""Products with FP8 weights beside bfloat16's and DeepGEMM's: parts of benchmarks/gpu.py, which runs them.

Layers of the 671B model. The own row includes the rounding of the activations; DeepGEMM is given rounded ones. What is
read is counted: weights once (of experts, those that have rows), activations and outputs.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from gpu import Row, difference, normal, peer, replayed
from torch import Tensor

from tokensieve import ops
from tokensieve.ops import quant

LAYERS = {"o_proj": (7168, 16384), "gate_proj, dense": (18432, 7168)}
SIZES = tuple((name, rows) for name in LAYERS for rows in (1, 16, 64, 8192))
EXPERTS, CHOSEN, HIDDEN, WIDTH = 256, 8, 7168, 2048


def weights(E: int, M: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """In bfloat16, in FP8, and the scales; of the last ones the first's values again, to save memory."""
    plain = normal(1, M, K)
    values, scale = quant.quantize_weight(plain[0])
    return plain, values[None].repeat(E, 1, 1), scale[None].repeat(E, 1, 1)


def linear(size: tuple[str, int], quick: bool) -> Iterator[Row]:
    (name, rows), deep_gemm = size, peer("deep_gemm")
    M, K = LAYERS[name]
    (plain, weight, scale), x = weights(1, M, K), normal(rows, K)
    row = Row(f"{name} fp8", f"{rows} x {K} x {M}", replayed(lambda: ops.block_linear(x, weight, scale), quick))
    row.tflop, row.gb = 2 * rows * M * K / 1e12, (M * K + rows * 2 * (M + K)) / 1e9
    row.peer, row.peer_ms = "bf16 linear", replayed(lambda: F.linear(x, plain[0]), quick)
    some = slice(0, rows, max(1, rows // 64))
    expected = ops.block_linear(x[some].float(), weight, scale, backend="reference")
    row.error = difference(ops.block_linear(x, weight, scale)[some], expected)
    yield row
    if deep_gemm is not None and hasattr(deep_gemm, "fp8_gemm_nt"):
        rounded, out = quant.quantize_e4m3(x, scale_format="ue8m0"), torch.empty(rows, M, dtype=x.dtype, device="cuda")
        again = Row(row.op, row.shape, row.own_ms, "DeepGEMM", tflop=row.tflop, gb=row.gb, error=row.error)
        again.peer_ms = replayed(lambda: deep_gemm.fp8_gemm_nt(rounded, (weight[0], scale[0]), out), quick)
        yield again


def experts(rows: int, quick: bool) -> Iterator[Row]:
    """Both matrices of 256 experts, of which each row has eight."""
    up, down = weights(EXPERTS, 2 * WIDTH, HIDDEN), weights(EXPERTS, HIDDEN, WIDTH)
    chosen = torch.stack([torch.randperm(EXPERTS, device="cuda")[:CHOSEN] for _ in range(rows)]).flatten().sort().values
    ends = torch.searchsorted(chosen, torch.arange(EXPERTS, device="cuda"), right=True).to(torch.int32)
    x = normal(rows * CHOSEN, HIDDEN)

    def own(backend: str = "auto", x: Tensor = x) -> Tensor:
        inner = ops.block_linear(x, *up[1:], ends, backend=backend)
        return ops.block_linear(inner, *down[1:], ends, gated=True, backend=backend)

    used = len(chosen.unique())
    row = Row("experts fp8", f"{rows} tokens, {used} experts", replayed(own, quick), "bf16 grouped_mm")
    row.tflop = 2 * rows * CHOSEN * 3 * WIDTH * HIDDEN / 1e12
    row.gb = (used * 3 * WIDTH * HIDDEN + rows * CHOSEN * 2 * (2 * HIDDEN + 3 * WIDTH)) / 1e9
    row.error = difference(own(), own("reference"))
    up_bf16, down_bf16 = (plain.repeat(EXPERTS, 1, 1) for plain in (up[0], down[0]))

    def plain() -> Tensor:
        gate, value = torch._grouped_mm(x, up_bf16.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        return torch._grouped_mm(F.silu(gate) * value, down_bf16.transpose(1, 2), offs=ends)

    row.peer_ms = replayed(plain, quick)
    yield row


PARTS: dict[str, tuple[Callable[..., Iterator[Row]], tuple]] = {
    "linear": (linear, SIZES),
    "experts": (experts, (1, 16, 64, 8192)),
}
