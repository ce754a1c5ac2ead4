"""The GPU kernels at the shapes of the 671B model, each beside its peer in the same run.

    make bench-gpu, or: python benchmarks/gpu.py [--only WORD] [--out FILE] [--quick]

Prefill: the last 4096 queries of a context, causal. Times are medians, of three runs where one takes long and of many
otherwise, those of the indexer in CUDA graphs on both sides; a row says how many times faster than the peer the own
kernel is, where the peer's package imports: DeepGEMM (`deep_gemm`), FlashMLA (`flash_mla`), PyTorch's own otherwise.
TFLOP/s and GB/s are counted from the work that the mathematics asks for, not from what a kernel does besides. Every
row's own result is compared with the reference on a few queries; gradients that all queries add to are compared as
those few alone give them. Table to standard output, figures to a JSON file; exit status 1 when a result is wrong, 2
without a GPU.
"""

import argparse
import importlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tokensieve import ops
from tokensieve.ops.quant import quantize_e4m3

ROOT = Path(__file__).resolve().parents[1]
HEADS, KEY, VALUE, INDEX_HEADS, INDEX_DIM, K = 128, 576, 512, 64, 128, 2048
NOPE, ROPE, HEAD_VALUE = 128, 64, 128
SCALE = 192**-0.5
QUERIES, FEW = 4096, 64

Step = Callable[[], Any]


@dataclass
class Row:
    """One measurement: milliseconds, and what was counted."""

    op: str
    shape: str
    own_ms: float
    peer: str = ""
    peer_ms: float | None = None
    tflop: float = 0.0  # 1e12 operations of one call
    gb: float = 0.0  # 1e9 bytes, each input and output once
    error: float = math.nan  # largest difference from the reference, relative to the largest value
    allowed: float = 0.02
    memory_gb: float = 0.0  # peak of one call above what was there before it

    @property
    def ratio(self) -> float | None:
        return None if self.peer_ms is None else self.peer_ms / self.own_ms


def long_milliseconds(step: Step) -> float:
    """The median of three runs after one, for steps that take up to seconds."""
    times = []
    for _ in range(4):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times[1:])[1]


def milliseconds(step: Step, quick: bool) -> float:
    from triton.testing import do_bench  # here: a machine without a GPU may not have it

    return do_bench(step, warmup=5 if quick else 25, rep=20 if quick else 100, return_mode="median")


def replayed(step: Step, quick: bool) -> float:
    """The same of a step in a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(step, rep=10 if quick else 50, return_mode="median")


def peak_gb(step: Step) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def difference(a: Tensor, e: Tensor) -> float:
    a, e = a.detach().double(), e.detach().double()
    return float((a - e).abs().max() / e.abs().max().clamp_min(1e-30))


def largest_difference(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """NaN where any is, which Python's own max would lose."""
    return float(torch.tensor([difference(a, e) for a, e in zip(actual, expected, strict=True)]).max())


def some(S: int) -> slice:
    """The queries that are compared."""
    return slice(0, S, S // FEW)


def peer(module: str) -> Any | None:
    return importlib.import_module(module) if importlib.util.find_spec(module) else None


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def last_queries(T: int, S: int = QUERIES) -> tuple[Tensor, Tensor]:
    ends = torch.arange(T - S + 1, T + 1, device="cuda", dtype=torch.int32)
    return torch.zeros_like(ends), ends


def pairs(starts: Tensor, ends: Tensor) -> int:
    return int((ends - starts).clamp_min(0).long().sum())


def index_inputs(T: int, S: int = QUERIES) -> tuple[Tensor, Tensor, Tensor]:
    w = torch.randn(S, INDEX_HEADS, device="cuda") * (INDEX_HEADS * INDEX_DIM) ** -0.5
    return normal(S, INDEX_HEADS, INDEX_DIM), normal(T, INDEX_DIM), w


def quantized(q: Tensor, k: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, w with the queries' scales folded in, and the keys' scales."""
    q8, q_scale = quantize_e4m3(q, INDEX_DIM, "ue8m0")
    k8, k_scale = quantize_e4m3(k, INDEX_DIM, "ue8m0")
    return q8, k8, w * q_scale.squeeze(-1), k_scale.squeeze(-1)


def random_selection(S: int, T: int) -> Tensor:
    """Ascending causal selections of the last S queries."""
    rows = []
    for t in range(T - S + 1, T + 1):
        chosen = torch.randperm(t, device="cuda")[:K].sort().values
        rows.append(torch.nn.functional.pad(chosen, (0, K - len(chosen)), value=-1))
    return torch.stack(rows).to(torch.int32)


def scores(T: int, quick: bool) -> Iterator[Row]:
    deep_gemm = peer("deep_gemm")
    q, k, w = index_inputs(T)
    q8, k8, w8, k_scale = quantized(q, k, w)
    starts, ends = last_queries(T)
    work, shape = pairs(starts, ends) * INDEX_HEADS * INDEX_DIM * 2 / 1e12, f"{QUERIES} x {T // 1024}K"
    few = some(QUERIES)
    seen = torch.arange(T, device="cuda")[None] < ends[few, None]
    for name, how, inputs, scale in (("fp8", "hopper", (q8, k8, w8), k_scale), ("bf16", "triton", (q, k, w), None)):

        def own(how=how, inputs=inputs, scale=scale) -> Tensor:
            return ops.index_scores(*inputs, starts, ends, scale, backend=how)

        row = Row(f"index scores {name}", shape, replayed(own, quick), tflop=work)
        queries, keys, weights = inputs
        expected = ops.index_scores(
            queries[few].float(), keys.float(), weights[few], starts[few], ends[few], scale, backend="reference"
        )
        row.error = difference(own()[few][seen], expected[seen])
        if name == "fp8" and deep_gemm is not None:
            row.peer = "DeepGEMM"
            row.peer_ms = replayed(
                lambda: deep_gemm.fp8_mqa_logits(q8, (k8, k_scale), w8, starts, ends, clean_logits=False), quick
            )
        yield row


def selection(shape: tuple[int, int], quick: bool) -> Iterator[Row]:
    S, T = shape
    x = torch.randn(S, T, device="cuda")
    starts, ends = torch.zeros(S, device="cuda").int(), torch.full((S,), T, device="cuda").int()
    own = replayed(lambda: ops.select_topk(x, K, starts, ends), quick)
    few = some(S)
    found = ops.select_topk(x, K, starts, ends)[few]
    expected = ops.select_topk(x[few], K, starts[few], ends[few], backend="reference")
    row = Row(f"top-{K}", f"{S} x {T // 1024}K", own, "torch.topk", gb=S * T * 4 / 1e9, allowed=0.0)
    row.error = float((found != expected).any(dim=1).float().mean())
    row.peer_ms = replayed(lambda: torch.topk(x, K, dim=1, sorted=False), quick)
    yield row


def index_and_select(T: int, quick: bool) -> Iterator[Row]:
    deep_gemm = peer("deep_gemm")
    q8, k8, w8, k_scale = quantized(*index_inputs(T))
    starts, ends = last_queries(T)
    shape, work = f"{QUERIES} x {T // 1024}K", pairs(starts, ends) * INDEX_HEADS * INDEX_DIM * 2 / 1e12
    names = {"hopper": "index and select"} | ({"auto": "the same as auto has it"} if deep_gemm is not None else {})
    for how, name in names.items():

        def own(how=how) -> Tensor:
            return ops.index_topk(q8, k8, w8, K, starts, ends, k_scale, backend=how)

        row = Row(name, shape, replayed(own, quick), tflop=work, allowed=0.0)
        apart = ops.select_topk(ops.index_scores(q8, k8, w8, starts, ends, k_scale, backend=how), K, starts, ends)
        row.error = float((own() != apart).any(dim=1).float().mean())
        if deep_gemm is not None:
            row.peer = "DeepGEMM's scores alone"
            row.peer_ms = replayed(
                lambda: deep_gemm.fp8_mqa_logits(q8, (k8, k_scale), w8, starts, ends, clean_logits=False), quick
            )
        yield row


def sparse_forward(T: int, quick: bool) -> Iterator[Row]:
    flash_mla = peer("flash_mla")
    q, kv, indices = normal(QUERIES, HEADS, KEY), normal(T, 1, KEY), random_selection(QUERIES, T)

    def own() -> tuple[Tensor, Tensor]:
        return ops.sparse_attention(q, kv, indices, SCALE, KEY, 0, VALUE, backend="hopper")

    row = Row("sparse forward", f"{QUERIES} x {T // 1024}K, k {K}", milliseconds(own, quick))
    row.tflop = float((indices >= 0).sum()) * HEADS * (KEY + VALUE) * 2 / 1e12
    few = some(QUERIES)
    expected = ops.sparse_attention(q[few], kv, indices[few], SCALE, KEY, 0, VALUE, backend="reference")[0]
    row.error = difference(own()[0][few], expected)
    if flash_mla is not None:
        row.peer = "FlashMLA"
        row.peer_ms = milliseconds(
            lambda: flash_mla.flash_mla_sparse_fwd(q, kv, indices.unsqueeze(1), SCALE, VALUE), quick
        )
        yield row
        chosen = milliseconds(lambda: ops.sparse_attention(q, kv, indices, SCALE, KEY, 0, VALUE), quick)
        row = Row("the same as auto has it", row.shape, chosen, "FlashMLA", row.peer_ms, row.tflop)
        row.error = difference(ops.sparse_attention(q, kv, indices, SCALE, KEY, 0, VALUE)[0][few], expected)
    yield row


def sparse_backward(T: int, quick: bool) -> Iterator[Row]:
    q, kv, indices = normal(QUERIES, HEADS, KEY), normal(T, 1, KEY), random_selection(QUERIES, T)
    q_I, k_I, w = index_inputs(T)
    leaves = [x.requires_grad_() for x in (q, kv, q_I, k_I, w)]
    dout, dkl = normal(QUERIES, HEADS, VALUE), torch.full((QUERIES,), 1 / QUERIES, device="cuda")

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        return ops.sparse_attention_kl(q, kv, indices, SCALE, KEY, 0, VALUE, q_I, k_I, w)

    out, _, kl = forward()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad((out, kl), leaves, (dout, dkl), retain_graph=True)

    few = some(QUERIES)

    def of_few(how: str) -> tuple[Tensor, ...]:
        """out, kl, and the gradients that the few queries give alone."""
        parts = [x.detach()[rows].requires_grad_() for x, rows in zip(leaves, (few, ..., few, ..., few), strict=True)]
        q, kv, q_I, k_I, w = parts
        out, _, kl = ops.sparse_attention_kl(q, kv, indices[few], SCALE, KEY, 0, VALUE, q_I, k_I, w, backend=how)
        return out, kl, *torch.autograd.grad((out, kl), parts, (dout[few], dkl[few]))

    expected, alone, found = of_few("reference"), of_few("auto"), backward()
    used = float((indices >= 0).sum())
    shape = f"{QUERIES} x {T // 1024}K, k {K}, {HEADS} heads"
    row = Row("sparse forward with KL", shape, milliseconds(forward, quick))
    row.tflop = used * (HEADS * (KEY + VALUE) + HEADS * KEY + INDEX_HEADS * INDEX_DIM) * 2 / 1e12
    row.error = largest_difference((out[few], kl[few]), expected[:2])
    yield row
    row = Row("sparse backward with KL", shape, milliseconds(backward, quick))
    row.tflop = used * (HEADS * (3 * KEY + 2 * VALUE) + 3 * INDEX_HEADS * INDEX_DIM) * 2 / 1e12
    within = [found[i][few] for i in (0, 2, 4)]
    row.error = largest_difference((*within, *alone), (*(expected[2 + i] for i in (0, 2, 4)), *expected))
    row.memory_gb = peak_gb(backward)
    yield row
    torch.use_deterministic_algorithms(True)
    try:
        ordered = Row("the same, deterministic", shape, milliseconds(backward, quick), tflop=row.tflop)
        first, second = backward(), backward()
        ordered.error = largest_difference(first, found) if all(map(torch.equal, first, second)) else math.nan
        ordered.memory_gb = peak_gb(backward)
    finally:
        torch.use_deterministic_algorithms(False)
    yield ordered


def layer(T: int, quick: bool) -> Iterator[Row]:
    """The attention of one training step, forward and backward, of all T queries.

    Projections are left out, those that both sides have and those of the indexer. Compared are the gradients of a few
    queries' own inputs, which a wrong selection would change too.
    """

    def dense_ms() -> float:
        leaves = [normal(HEADS, T, width)[None].requires_grad_() for width in (NOPE + ROPE, NOPE + ROPE, HEAD_VALUE)]
        dout = normal(HEADS, T, HEAD_VALUE)[None]

        def dense() -> tuple[Tensor, ...]:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
                out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=SCALE)
                return torch.autograd.grad(out, leaves, dout)

        return long_milliseconds(dense)

    peer_ms = dense_ms()
    torch.cuda.empty_cache()
    q_I, k_I, w = index_inputs(T, T)
    leaves = [x.requires_grad_() for x in (normal(T, HEADS, KEY), normal(T, 1, KEY), q_I, k_I, w)]
    ends = last_queries(T, T)[1]
    dout, dkl = normal(T, HEADS, VALUE), torch.full((T,), 1 / T, device="cuda")

    def attention(inputs: Sequence[Tensor], ends: Tensor, how: str = "auto") -> tuple[Tensor, Tensor]:
        q, kv, q_I, k_I, w = inputs
        indices = ops.index_topk(q_I, k_I, w, K, torch.zeros_like(ends), ends)
        out, _, kl = ops.sparse_attention_kl(q, kv, indices, SCALE, KEY, 0, VALUE, q_I, k_I, w, backend=how)
        return out, kl

    def own() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(leaves, ends), leaves, (dout, dkl))

    row = Row("attention of a layer, both ways", f"{T // 1024}K", long_milliseconds(own), "dense, cuDNN", peer_ms)
    row.memory_gb = peak_gb(own)
    few, found = some(T), own()
    parts = [x.detach()[i].requires_grad_() for x, i in zip(leaves, (few, ..., few, ..., few), strict=True)]
    expected = torch.autograd.grad(attention(parts, ends[few], "reference"), parts, (dout[few], dkl[few]))
    row.error = largest_difference((found[i][few] for i in (0, 2, 4)), (expected[i] for i in (0, 2, 4)))
    yield row


def warmup(T: int, quick: bool) -> Iterator[Row]:
    """One layer's KL of equation (3) beyond the dense forward that it needs anyway."""
    q, k = normal(T, HEADS, NOPE + ROPE), normal(T, HEADS, NOPE + ROPE)
    v = normal(T, HEADS, HEAD_VALUE)
    inputs = index_inputs(T, T)
    starts, ends = torch.zeros(T, device="cuda").int(), torch.arange(1, T + 1, device="cuda").int()

    def dense() -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            heads = (x.transpose(0, 1)[None] for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=SCALE)

    bounds = torch.tensor([0, T], device="cuda", dtype=torch.int32)
    lse = ops.dense_attention(q, k, v, starts, ends, SCALE, bounds=bounds, longest=T)[1]
    weight = torch.full((T,), 1 / T, device="cuda")

    def step(rows: slice = slice(None), how: str = "auto") -> tuple[Tensor, ...]:
        """The loss and its gradients, of some queries alone."""
        q_I, k_I, w = leaves = [x[i].detach().requires_grad_() for x, i in zip(inputs, (rows, ..., rows), strict=True)]
        given = (starts[rows], ends[rows], weight[rows])
        kl = ops.indexer_kl_dense_sum(q[rows], k, lse[rows], SCALE, q_I, k_I, w, *given, backend=how)
        return kl.detach(), *torch.autograd.grad(kl, leaves)

    row = Row("warm-up step", f"{T // 1024}K, {HEADS} heads", milliseconds(step, quick), "cuDNN's dense forward")
    row.peer_ms = milliseconds(dense, quick)
    row.tflop = T * (T + 1) / 2 * (HEADS * (NOPE + ROPE) + 3 * INDEX_HEADS * INDEX_DIM) * 2 / 1e12
    row.memory_gb = peak_gb(step)
    few = some(T)
    expected, alone, found = step(few, "reference"), step(few), step()
    within = [found[i][few] for i in (1, 3)]
    row.error = largest_difference((*within, *alone), (*(expected[i] for i in (1, 3)), *expected))
    yield row


CONTEXTS = (8192, 32768, 131072)
PARTS: dict[str, tuple[Callable[..., Iterator[Row]], tuple]] = {
    "scores": (scores, CONTEXTS),
    "topk": (selection, ((4096, 8192), (4096, 32768), (1024, 131072))),
    "index-and-select": (index_and_select, CONTEXTS[-1:]),
    "forward": (sparse_forward, CONTEXTS),
    "backward": (sparse_backward, CONTEXTS),
    "warmup": (warmup, CONTEXTS),
    "layer": (layer, CONTEXTS[1:]),
}


def is_wrong(row: Row) -> bool:
    return not row.error <= row.allowed  # NaN is wrong too


def show(rows: list[Row]) -> None:
    table = Table("op", "shape", "ms", "TFLOP/s", "GB/s", "peer", "its ms", "times faster", "error", "GB above")
    for row in rows:
        table.add_row(
            row.op, row.shape, f"{row.own_ms:.3f}",
            f"{row.tflop / row.own_ms * 1e3:.0f}" if row.tflop else "",
            f"{row.gb / row.own_ms * 1e3:.0f}" if row.gb else "",
            row.peer, f"{row.peer_ms:.3f}" if row.peer_ms else "", f"{row.ratio:.2f}" if row.ratio else "",
            f"{row.error:.1e}" + (" wrong" if is_wrong(row) else ""),
            f"{row.memory_gb:.2f}" if row.memory_gb else "",
        )  # fmt: skip
    Console(width=170).print(table)


def main() -> int:
    from gpu_linear import PARTS as LINEAR  # which take what they measure with from here
    from gpu_masked import PARTS as MASKED
    from gpu_paged import PARTS as PAGED

    parts = PARTS | MASKED | PAGED | LINEAR
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=parts, help="a part; may be given several times")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, two sizes of each")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench-gpu: torch sees no CUDA device here", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    begin, rows = time.perf_counter(), []
    for name in options.only or parts:
        measure, sizes = parts[name]
        for size in sizes[:2] if options.quick else sizes:
            for row in measure(size, options.quick):
                rows.append(row)
                print(
                    f"{time.perf_counter() - begin:4.0f} s  {row.op}, {row.shape}: {row.own_ms:.3f} ms", file=sys.stderr
                )
            torch.cuda.empty_cache()
    show(rows)
    import triton

    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figures = {"machine": machine, "rows": [asdict(row) for row in rows]}
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return int(any(is_wrong(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
