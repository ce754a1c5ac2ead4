"""Every op's outputs and gradients on one case, by name: what tests of a backend compare."""

import torch
from torch import Tensor

from tests.support import interpreter  # noqa: F401  # makes it faster
from tests.support.cases import Inputs
from tokensieve import ops

SPARSE = ("sparse_attention", "sparse_attention_kl")
ALL = ("index_scores", *SPARSE, "masked_attention", "indexer_kl_dense")


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def results(x: Inputs, how: str, wanted: tuple[str, ...] = ALL) -> dict[str, Tensor]:
    """Outputs and gradients of the ops `wanted`, computed by backend `how`."""
    values: dict[str, Tensor] = {}
    g = torch.Generator().manual_seed(1)

    def take(name: str, outputs: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
        # powers of two: exact in every dtype
        cotangents = [torch.exp2(torch.randint(-3, 1, y.shape, generator=g)).to(y) for y in outputs.values()]
        cotangents = [torch.where(y.isfinite(), c, 0.0) for y, c in zip(outputs.values(), cotangents, strict=True)]
        gradients = torch.autograd.grad(list(outputs.values()), list(inputs.values()), cotangents)
        values.update({f"{name}: {what}": y.detach() for what, y in outputs.items()})
        values.update({f"{name}: d {what}": y for what, y in zip(inputs, gradients, strict=True)})

    visible = x.visible_ST()
    if "index_scores" in wanted:
        q_I, k_I, w = leaves(x.q_SID, x.k_TD, x.w_SI)
        scores = ops.index_scores(q_I, k_I, w, x.starts_S, x.ends_S, backend=how)
        take("index_scores", {"scores": torch.where(visible, scores, 0.0)}, {"q_I": q_I, "k_I": k_I, "w": w})
    q, kv = leaves(x.q_SHD, x.kv_TGE)
    out, lse = ops.sparse_attention(q, kv, x.indices_SK, x.scale, **x.parts, backend=how)
    take("sparse_attention", {"out": out, "lse": lse}, {"q": q, "kv": kv})
    if "sparse_attention_kl" in wanted:
        q, kv, q_I, k_I, w = leaves(x.q_SHD, x.kv_TGE, x.q_SID, x.k_TD, x.w_SI)
        out, lse, kl = ops.sparse_attention_kl(
            q, kv, x.indices_SK, x.scale, *x.parts.values(), q_I, k_I, w, backend=how
        )
        inputs = {"q": q, "kv": kv, "q_I": q_I, "k_I": k_I, "w": w}
        take("sparse_attention_kl", {"out": out, "lse": lse, "kl": kl}, inputs)
    if "masked_attention" in wanted:
        copies = x.q_SHD.shape[1] // x.kv_TGE.shape[1]
        # of a latent entry the widths that its expanded heads have at the 671B model's shape
        q, k, v = leaves(
            x.q_SHD[..., :192], *(y.repeat_interleave(copies, 1) for y in (x.k_TGD[..., :192], x.v_TGV[..., :128]))
        )
        out, lse = ops.masked_attention(q, k, v, x.indices_SK, x.scale, backend=how)
        take("masked_attention", {"out": out, "lse": lse}, {"q": q, "k": k, "v": v})
    if "indexer_kl_dense" not in wanted:
        return values
    q_I, k_I, w = leaves(x.q_SID, x.k_TD, x.w_SI)
    spans = (edge.clamp(0, len(x.k_TD)) for edge in (x.starts_S, x.ends_S))
    lse = ops.dense_attention(x.q_SHD, x.k_TGD, x.v_TGV, *spans, x.scale, backend="reference")[1]
    kl = ops.indexer_kl_dense(x.q_SHD, x.k_TGD, lse, x.scale, q_I, k_I, w, x.starts_S, x.ends_S, backend=how)
    take("indexer_kl_dense", {"kl": kl}, {"q_I": q_I, "k_I": k_I, "w": w})
    return values
