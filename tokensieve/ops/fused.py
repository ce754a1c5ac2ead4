"""Dense attention through PyTorch's fused kernels: flash attention on the CPU, its variable-length form on CUDA, and
cuDNN's for chunks on Hopper. No other op runs here.

Legend: S query tokens, T key tokens, H heads, G key-value groups, D key width, V value width. One of three cases:

- S = T and `bounds`, a causal pack: query i is key i, documents one after another.
- S < T and `bounds`, a chunk: the queries are the last S tokens of one document of T.
- S < T without `bounds`: the queries are blocks of a causal pack of T, as context parallelism deals them
  (`scattered.py`).

`bounds` (documents + 1) int32 are the cumulative lengths of the documents' keys, `longest` is the longest document in
tokens.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokensieve.ops.scattered import FEWEST, Level, levels

OPS = ("dense_attention",)
_CUDA_DTYPES = (torch.float16, torch.bfloat16)
_WIDTH_STEP, _WIDEST = 8, 256  # what flash attention on CUDA takes


def limits(op: str, q: Tensor, operands: Mapping[str, Any]) -> str | None:
    """Why PyTorch's kernels cannot take this call, in one clause, or None if they can.

    Without `bounds` it looks at the ranges and waits for the device, once a pack (`scattered.levels`).
    """
    k, v = operands["k"], operands["v"]
    if not q.dtype == k.dtype == v.dtype:
        return f"flash attention does not take {q.dtype} with {k.dtype} and {v.dtype}"
    if q.device.type == "cuda" and q.dtype not in _CUDA_DTYPES:
        return f"flash attention on CUDA does not take {q.dtype}"
    if q.device.type == "cuda" and max(q.shape[2], v.shape[2]) > _WIDEST:
        return f"flash attention on CUDA takes heads up to {_WIDEST} wide"
    if q.device.type != "cuda" and q.dtype not in (torch.float32, torch.bfloat16):
        return f"flash attention on the CPU is not used for {q.dtype}"
    if operands["bounds"] is not None:
        return None
    if not FEWEST <= q.shape[0] < k.shape[0]:
        return "the keys are not a causal pack of whole documents"
    if q.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "without `bounds` it looks at the ranges, which cannot be captured in a CUDA graph"
    if levels(operands["starts"], operands["ends"], k.shape[0]) is None:
        return "the queries are not blocks of a causal pack"
    return None


def _width(*widths: int) -> int:
    """The width all are padded to: zeros beside queries and keys change no score, and beside values they stay so."""
    return -(-max(widths) // _WIDTH_STEP) * _WIDTH_STEP


def _wide(x_SHD: Tensor, width: int) -> Tensor:
    return F.pad(x_SHD, (0, width - x_SHD.shape[2])) if x_SHD.shape[2] < width else x_SHD


def _per_query_head(x_TGD: Tensor, H: int) -> Tensor:
    G = x_TGD.shape[1]
    return x_TGD if G == H else x_TGD.repeat_interleave(H // G, dim=1)


def _fold_heads(dx_SHD: Tensor, G: int) -> Tensor:
    S, H, D = dx_SHD.shape
    return dx_SHD if G == H else dx_SHD.view(S, G, H // G, D).sum(2)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, bounds: Tensor | None, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    if bounds is None:
        return _scattered(q, k, v, starts, ends, scale)
    if q.shape[0] < k.shape[0]:
        return _chunk(q, k, v, bounds, longest, scale)
    H, V = q.shape[1], v.shape[2]
    width = _width(q.shape[2], V)  # both kernels take one width for keys and values
    q, k, v = _wide(q, width), _wide(_per_query_head(k, H), width), _wide(_per_query_head(v, H), width)
    if q.is_cuda:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
        )
        return out[..., :V].contiguous(), lse.transpose(0, 1).contiguous()
    outs, lses = [], []
    for a, b in _documents(bounds):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads(q, a, b), _heads(k, a, b), _heads(v, a, b), 0.0, True, scale=scale
        )
        outs.append(out[0].transpose(0, 1)[..., :V])
        lses.append(_lse(lse))
    return torch.cat(outs), torch.cat(lses)


def _chunk(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
    """Two calls, merged by their logsumexps: every query sees all of the past, and the chunk itself causally.

    Flash attention on CUDA aligns its mask to the last key and needs only one call. On Hopper cuDNN takes its place, at
    584 TFLOP/s (docs/kernels.md).
    """
    (S, H, D), V = q.shape, v.shape[2]
    past = k.shape[0] - S
    k, v = _per_query_head(k, H), _per_query_head(v, H)
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] != 9:
        width = _width(D, V)
        query_bounds = torch.tensor([0, S], dtype=torch.int32, device=q.device)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            _wide(q, width), _wide(k, width), _wide(v, width), query_bounds, bounds, S, longest, 0.0, True, False,
            scale=scale,
        )  # fmt: skip
        return out[..., :V].contiguous(), lse.transpose(0, 1).contiguous()
    attend = _cudnn if q.is_cuda else _cpu
    out_past, lse_past = attend(q, k[:past], v[:past], False, scale)
    out_chunk, lse_chunk = attend(q, k[past:], v[past:], True, scale)
    lse = torch.logaddexp(lse_past, lse_chunk)
    out = out_past * (lse_past - lse).exp()[..., None] + out_chunk * (lse_chunk - lse).exp()[..., None]
    return out.to(q.dtype), lse


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    V = v.shape[2]
    q, k, v = (_wide(x, _width(x.shape[2])) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)), None, True, 0.0, causal, False, scale=scale
    )
    return out[0].transpose(0, 1)[..., :V], lse[0].reshape(q.shape[1], -1).t()


def _cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    width = max(q.shape[2], v.shape[2])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_wide(x, width).transpose(0, 1).unsqueeze(0) for x in (q, k, v)), 0.0, causal, scale=scale
    )
    return out[0].transpose(0, 1)[..., : v.shape[2]], _lse(lse)


def dense_attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    starts: Tensor, ends: Tensor, bounds: Tensor | None, longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if bounds is not None and q.shape[0] < k.shape[0]:
        raise ValueError("the fused dense_attention has no gradient for a chunk; leave `bounds` out")
    H, D, V, G = q.shape[1], q.shape[2], v.shape[2], k.shape[1]
    dout, out, width = _with_dlse(dout, dlse, out, D)
    if bounds is None:
        return _scattered_backward(dout, out, lse, q, k, v, starts, ends, scale, width)
    q, k, v = _wide(q, width), _wide(_per_query_head(k, H), width), _wide(_per_query_head(v, H), width)
    if q.is_cuda:
        # dropout is off: the kernel's random state is never read
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout.contiguous(), q, k, v, out.contiguous(), lse.transpose(0, 1).contiguous(),
            bounds, bounds, longest, longest, 0.0, True, seed, seed[:0], scale=scale,
        )  # fmt: skip
    else:
        parts = []
        for a, b in _documents(bounds):
            parts.append(
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    _heads(dout, a, b), _heads(q, a, b), _heads(k, a, b), _heads(v, a, b), _heads(out, a, b),
                    lse[a:b].t()[None].contiguous(), 0.0, True, scale=scale,
                )
            )  # fmt: skip
        dq, dk, dv = (torch.cat([p[i][0].transpose(0, 1) for p in parts]) for i in range(3))
    return dq[..., :D].contiguous(), _fold_heads(dk[..., :D], G).contiguous(), _fold_heads(dv[..., :V], G).contiguous()


def _with_dlse(dout: Tensor, dlse: Tensor | None, out: Tensor, D: int) -> tuple[Tensor, Tensor, int]:
    """dout and out of one width with q and k, and that width.

    A logit's gradient is p (dout . v - dout . out + dlse). So dlse goes in as a further column of values that are zero:
    there dout is 1 and out is -dlse. ValueError if that is too wide for flash attention on CUDA.
    """
    V = out.shape[2]
    if dlse is None:
        width = _width(D, V)
        return _wide(dout, width), _wide(out, width), width
    width = _width(D, V + 1)
    if out.is_cuda and width > _WIDEST:
        raise ValueError(
            f"the fused dense_attention has no gradient through its logsumexp for values {V} wide; "
            "use backend='reference'"
        )
    dout, out = _wide(dout, width), _wide(out, width)  # copies, being wider
    dout[..., V], out[..., V] = 1, -dlse
    return dout, out, width


def _scattered(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    (S, H, D), V = q.shape, v.shape[2]
    width = _width(D, V)
    out = torch.zeros(S, H, V, dtype=torch.float32, device=q.device)
    lse = torch.full((S, H), float("-inf"), device=q.device)
    for level in _levels(starts, ends, k):
        rows = level.rows
        q_n, k_n, v_n = _parts(level, q, k, v, width)
        if q.is_cuda:
            more, its, *_ = torch.ops.aten._flash_attention_forward(
                q_n, k_n, v_n, level.query_bounds, level.key_bounds, level.longest_query, level.longest_key,
                0.0, level.causal, False, scale=scale,
            )  # fmt: skip
            its = its.transpose(0, 1)
        else:
            pieces = [
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    _heads(q_n, a, b), _heads(k_n, c, d), _heads(v_n, c, d), 0.0, level.causal, scale=scale
                )
                for (a, b), (c, d) in _segments(level)
            ]
            more = torch.cat([piece[0][0].transpose(0, 1) for piece in pieces])
            its = torch.cat([_lse(piece[1]) for piece in pieces])
        both = torch.logaddexp(lse[rows], its)
        out[rows] = out[rows] * (lse[rows] - both).exp()[..., None] + more[..., :V] * (its - both).exp()[..., None]
        lse[rows] = both
        del q_n, k_n, v_n, more  # before those of the next level are made
    return out.to(q.dtype), lse


def _scattered_backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    starts: Tensor, ends: Tensor, scale: float, width: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """With the output and the logsumexp of all levels, the gradients are sums over levels."""
    D, V, G = q.shape[2], v.shape[2], k.shape[1]
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (q, k, v))
    for level in _levels(starts, ends, k):
        rows, keys = level.rows, level.keys
        q_n, k_n, v_n = _parts(level, q, k, v, width)
        dout_n, out_n, lse_n = dout[rows], out[rows], lse[rows]
        if q.is_cuda:
            seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # never read
            found = torch.ops.aten._flash_attention_backward(
                dout_n, q_n, k_n, v_n, out_n, lse_n.transpose(0, 1).contiguous(), level.query_bounds, level.key_bounds,
                level.longest_query, level.longest_key, 0.0, level.causal, seed, seed[:0], scale=scale,
            )  # fmt: skip
        else:
            pieces = [
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    _heads(dout_n, a, b), _heads(q_n, a, b), _heads(k_n, c, d), _heads(v_n, c, d),
                    _heads(out_n, a, b), lse_n[a:b].t()[None].contiguous(), 0.0, level.causal, scale=scale,
                )
                for (a, b), (c, d) in _segments(level)
            ]  # fmt: skip
            found = tuple(torch.cat([piece[i][0].transpose(0, 1) for piece in pieces]) for i in range(3))
        dq[rows] += found[0][..., :D]
        dk[keys] += _fold_heads(found[1][..., :D], G)
        dv[keys] += _fold_heads(found[2][..., :V], G)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _levels(starts: Tensor, ends: Tensor, k: Tensor) -> tuple[Level, ...]:
    found = levels(starts, ends, k.shape[0])
    assert found is not None  # or `limits` would have said so
    return found


def _parts(level: Level, q: Tensor, k: Tensor, v: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The level's queries, and its keys and values for each query head, all of one width."""
    H, k, v = q.shape[1], k[level.keys], v[level.keys]
    return _wide(q[level.rows], width), _wide(_per_query_head(k, H), width), _wide(_per_query_head(v, H), width)


def _segments(level: Level) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Of queries and of keys."""
    queries, keys = (itertools.pairwise(bounds.tolist()) for bounds in (level.query_bounds, level.key_bounds))
    return zip(queries, keys, strict=True)


def _documents(bounds: Tensor) -> list[tuple[int, int]]:
    edges = bounds.tolist()
    return [(a, b) for a, b in itertools.pairwise(edges) if b > a]


def _heads(x_SHD: Tensor, a: int, b: int) -> Tensor:
    return x_SHD[a:b].transpose(0, 1).unsqueeze(0)


def _lse(lse_1HS: Tensor) -> Tensor:
    return lse_1HS[0].t().to(torch.float32)
