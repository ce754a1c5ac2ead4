"""Registers the ops on caches in pages with PyTorch; as `custom.py` does the others. None has a gradient."""

from torch import Tensor, float8_e4m3fn, float32
from torch.library import custom_op

from tokensieve.ops.custom import empty, full_precision
from tokensieve.ops.dispatch import pick
from tokensieve.ops.quant import PAGE_TOKENS
from tokensieve.ops.reference.blocks import compute_dtype


@custom_op("tokensieve::quantize_queries", mutates_args=())
@full_precision
def quantize_queries(
    q: Tensor, w: Tensor, cos: Tensor | None, sin: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return pick("quantize_queries", q, backend).quantize_queries(q, w, cos, sin)


@quantize_queries.register_fake
def _(q, w, cos, sin, backend):
    return empty(q, *q.shape, dtype=float8_e4m3fn), empty(q, *w.shape, dtype=float32)


@custom_op("tokensieve::index_scores_paged", mutates_args=())
@full_precision
def index_scores_paged(
    q: Tensor, index_pages: Tensor, w: Tensor, page_table: Tensor, lens: Tensor, backend: str
) -> Tensor:
    return pick("index_scores_paged", q, backend).index_scores_paged(q, index_pages, w, page_table, lens)


@index_scores_paged.register_fake
def _(q, index_pages, w, page_table, lens, backend):
    return empty(q, q.shape[0], page_table.shape[1] * PAGE_TOKENS, dtype=compute_dtype(q))


@custom_op("tokensieve::sparse_attention_paged", mutates_args=())
@full_precision
def sparse_attention_paged(
    q: Tensor,
    latent_pages: Tensor,
    indices: Tensor,
    page_table: Tensor,
    lens: Tensor,
    scale: float,
    d_v: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = pick("sparse_attention_paged", q, backend, latent_pages=latent_pages, indices=indices)
    return module.sparse_attention_paged(q, latent_pages, indices, page_table, lens, scale, d_v)


@sparse_attention_paged.register_fake
def _(q, latent_pages, indices, page_table, lens, scale, d_v, backend):
    S, H = q.shape[:2]
    return empty(q, S, H, d_v), empty(q, S, H, dtype=compute_dtype(q))


@custom_op("tokensieve::write_caches", mutates_args=("latent_pages", "index_pages"))
@full_precision
def write_caches(
    latent: Tensor,
    k_rope: Tensor,
    k_I: Tensor,
    latent_pages: Tensor,
    index_pages: Tensor,
    slots: Tensor,
    backend: str,
) -> None:
    module = pick("write_caches", latent, backend)
    module.write_caches(latent, k_rope, k_I, latent_pages, index_pages, slots)


@write_caches.register_fake
def _(latent, k_rope, k_I, latent_pages, index_pages, slots, backend):
    return None
