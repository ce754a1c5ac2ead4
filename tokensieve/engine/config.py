"""Settings of an engine, and the size of its cache."""

from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from tokensieve.config import UserError
from tokensieve.engine.runner import page_bytes
from tokensieve.engine.scheduler import pages_for
from tokensieve.model import DecoderForCausalLM
from tokensieve.model.context import Form
from tokensieve.ops.quant import PAGE_TOKENS

PASS_TOKENS = 8192  # of a pass on a GPU: with fewer, the kernels of a small model end before the next are launched


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine.

    pages: size of the cache in pages of 64 tokens. 0 takes a quarter of the free memory, or 85% of a GPU's, but no more
        than `running` full contexts need.
    running: requests that run at once.
    chunk: tokens of a prompt that are run at once, a multiple of 64.
    chunks: chunks of prompts that are run between two tokens of the answers.
    pass_tokens: chunks of several prompts run in one pass, as long as these prompts have no more tokens than this
        together, up to the ends of the chunks. 0 takes 8192 on a GPU. On the CPU it gives each chunk a pass of its own,
        so that an answer's bits do not depend on other requests.
    prefix_cache: whether prompts that begin alike share the pages of their beginning.
    backend: backend of the ops.
    top_k: keys selected per query. 0 takes the number in the model's config.
    check_selection: whether what your own selectors return is checked. None checks it on the CPU only.
    form: how chunks of prompts read their keys, as in `tokensieve.model.context.Form`. auto takes what costs less;
        gathered is what training does, and agrees with it best.
    keep_selection: whether the last output of a request brings the keys that each token's attention read. Memory: 4 k
        bytes for each token of the cache and layer.

    Raises UserError for values outside of these ranges.
    """

    pages: int = 0
    running: int = 64
    chunk: int = 512
    chunks: int = 2
    pass_tokens: int = 0
    prefix_cache: bool = True
    backend: Literal["auto", "reference"] = "auto"
    top_k: int = 0
    check_selection: bool | None = None
    form: Form = "auto"
    keep_selection: bool = False

    def __post_init__(self) -> None:
        least = {"pages": 0, "running": 1, "chunk": PAGE_TOKENS, "chunks": 1, "pass_tokens": 0, "top_k": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if not value >= bound:  # a NaN too
                raise UserError(f"engine: {name} is {value}; it must be at least {bound}")
        if self.chunk % PAGE_TOKENS:
            raise UserError(f"engine: chunk is {self.chunk}; it must be a multiple of {PAGE_TOKENS}")


def default_pages(model: DecoderForCausalLM, running: int, processes: int = 1, kept_keys: int = 0) -> int:
    """Number of pages if `EngineConfig.pages` is 0.

    kept_keys: of each token's selection that is kept.
    processes: processes that share the processor's memory. On GPUs each process has a GPU of its own.
    """
    share = 0.85 if model.device.type == "cuda" else 1 / (4 * processes)
    budget = int(_free_memory(model.device) * share)
    full_contexts = running * pages_for(model.config.max_position_embeddings)
    return max(1, min(full_contexts, budget // page_bytes(model, kept_keys)))


def check_pages(model: DecoderForCausalLM, pages: int, kept_keys: int) -> None:
    """Raises UserError for more pages than there is memory for."""
    each, free = page_bytes(model, kept_keys), _free_memory(model.device)
    if pages * each > free:
        raise UserError(
            f"{pages} pages of the cache need {pages * each / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; "
            f"choose at most {free // each} pages"
        )


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
