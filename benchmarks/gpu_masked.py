"""Masked attention, the form for short prefills, beside what it could be replaced by: parts of benchmarks/gpu.py, which
runs them.

All tokens of one sequence, each with K random causal keys of its own, at the 671B shapes. Peers: cuDNN's dense causal
attention of the same heads, forward alone and with its backward; and the other form of the same selection,
`sparse_attention` over latent entries. The projections that tell the two forms apart are left out. TFLOP/s count
selected keys only, of which dense attention has more.
"""

from collections.abc import Callable, Iterator

import torch
from gpu import (
    HEAD_VALUE,
    HEADS,
    KEY,
    NOPE,
    ROPE,
    SCALE,
    VALUE,
    K,
    Row,
    difference,
    largest_difference,
    milliseconds,
    normal,
    random_selection,
    some,
)
from torch import Tensor

from tokensieve import ops

LENGTHS = (2048, 4096, 8192)


def masked(T: int, quick: bool) -> Iterator[Row]:
    q, k, v = leaves = [normal(T, HEADS, width).requires_grad_() for width in (NOPE + ROPE, NOPE + ROPE, HEAD_VALUE)]
    indices, dout, few = random_selection(T, T), normal(T, HEADS, HEAD_VALUE), some(T)

    def own() -> Tensor:
        return ops.masked_attention(q, k, v, indices, SCALE, backend="triton")[0]

    def dense() -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            heads = (x.transpose(0, 1)[None] for x in leaves)
            out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=SCALE)
        return out[0].transpose(0, 1)

    def of_few(how: str) -> tuple[Tensor, ...]:
        """out and the gradients of the few queries alone."""
        parts = [x.detach()[rows].requires_grad_() for x, rows in zip(leaves, (few, ..., ...), strict=True)]
        out = ops.masked_attention(*parts, indices[few], SCALE, backend=how)[0]
        return out, *torch.autograd.grad(out, parts, dout[few])

    shape, used = f"{T}, k {K}, {HEADS} heads", float((indices >= 0).sum()) * HEADS * 2 / 1e12
    out = own()
    expected, alone, found = of_few("reference"), of_few("triton"), torch.autograd.grad(out, leaves, dout)
    with torch.no_grad():
        row = Row("masked forward", shape, milliseconds(own, quick), "dense, cuDNN", milliseconds(dense, quick))
    row.tflop, row.error = used * (NOPE + ROPE + HEAD_VALUE), difference(out[few], expected[0])
    yield row
    both = [milliseconds(lambda f=f: torch.autograd.grad(f(), leaves, dout), quick) for f in (own, dense)]
    row = Row("masked forward and backward", shape, both[0], "dense, cuDNN", both[1])
    row.tflop = used * (4 * (NOPE + ROPE) + 3 * HEAD_VALUE)
    row.error = largest_difference((out[few], found[0][few], *alone), (*expected[:2], *expected))
    yield row


def forms(T: int, quick: bool) -> Iterator[Row]:
    """Both forms of the same selection, on inputs of their own: up to which length the narrower heads pay."""
    q, k, v = (normal(T, HEADS, width) for width in (NOPE + ROPE, NOPE + ROPE, HEAD_VALUE))
    absorbed, entries, indices, few = normal(T, HEADS, KEY), normal(T, 1, KEY), random_selection(T, T), some(T)

    def own() -> Tensor:
        return ops.masked_attention(q, k, v, indices, SCALE, backend="triton")[0]

    def gathered() -> Tensor:
        return ops.sparse_attention(absorbed, entries, indices, SCALE, KEY, 0, VALUE, backend="hopper")[0]

    row = Row("masked forward", f"{T}, k {K}, {HEADS} heads", milliseconds(own, quick), "sparse MQA")
    row.peer_ms = milliseconds(gathered, quick)
    row.error = difference(own()[few], ops.masked_attention(q[few], k, v, indices[few], SCALE, backend="reference")[0])
    yield row


PARTS: dict[str, tuple[Callable[..., Iterator[Row]], tuple]] = {
    "masked": (masked, LENGTHS),
    "masked-forms": (forms, (*LENGTHS, 16384)),
}
