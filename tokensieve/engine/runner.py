"""Runs the model on the cache's pages: a chunk of one prompt, or one token of every sequence.

Legend: S tokens of a chunk, T tokens of a sequence so far, B sequences, P pages, V vocabulary.

Every row's numbers are the same whatever runs beside it, on the CPU to the bit: a chunk holds tokens of one prompt only and begins where
every chunk of that prompt begins, and a step's rows are padded to a multiple of four, since matrix libraries treat a rest of rows
otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.engine.graphs import Graphs, StepInputs
from tokensieve.engine.lens import Lens
from tokensieve.model import DecoderForCausalLM
from tokensieve.model.attention import Pass
from tokensieve.model.moe import ORDINARY_ROWS
from tokensieve.model.pack import Pack
from tokensieve.model.pages import PagedStep, write_pages
from tokensieve.model.selection import Selection, dense, resolve
from tokensieve.ops import quant
from tokensieve.ops.quant import PAGE_TOKENS


@dataclass(frozen=True)
class Pools:
    """All pages of all layers, as `tokensieve.ops.paged` describes them; index pages of a dense model have no width."""

    latent: tuple[Tensor, ...]
    index: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (*self.latent, *self.index))


def is_quantized(model: DecoderForCausalLM) -> tuple[bool, bool]:
    """Whether latents and index keys are held in FP8: on a GPU, in the layouts' own widths, the keys where the model's indexer wants it."""
    c = model.config
    latent = model.device.type == "cuda" and (c.kv_lora_rank, c.qk_rope_head_dim) == (
        quant.LATENT_WIDTH,
        quant.ROPE_WIDTH,
    )
    fp8 = model.is_sparse and getattr(c, "index_dtype", "bf16") == "fp8"
    return latent, latent and fp8 and c.index_head_dim == quant.INDEX_WIDTH


def page_bytes(model: DecoderForCausalLM) -> int:
    """Of one page in every layer."""
    c, size = model.config, torch.finfo(model.dtype).bits // 8
    latent, index = is_quantized(model)
    each = PAGE_TOKENS * (quant.LATENT_TOKEN_BYTES if latent else (c.kv_lora_rank + c.qk_rope_head_dim) * size)
    if model.is_sparse:
        each += quant.INDEX_PAGE_BYTES if index else PAGE_TOKENS * c.index_head_dim * size
    return each * c.num_hidden_layers


def make_pools(model: DecoderForCausalLM, pages: int) -> Pools:
    c, device = model.config, model.device
    latent_fp8, index_fp8 = is_quantized(model)

    def pool(*shape: int, quantized: bool) -> Tensor:
        return torch.zeros(pages, *shape, dtype=torch.uint8 if quantized else model.dtype, device=device)

    width = quant.LATENT_TOKEN_BYTES if latent_fp8 else c.kv_lora_rank + c.qk_rope_head_dim
    keys = (quant.INDEX_PAGE_BYTES,) if index_fp8 else (PAGE_TOKENS, getattr(c, "index_head_dim", 0))
    layers = range(c.num_hidden_layers)
    return Pools(
        tuple(pool(PAGE_TOKENS, width, quantized=latent_fp8) for _ in layers),
        tuple(pool(*keys, quantized=index_fp8) for _ in layers),
    )


class ChunkCache:
    """What a chunk's attention writes to and reads: the pages of its own sequence, which it sees as the model's other caches look."""

    def __init__(self, pools: Pools, table_P: Tensor, past: int, tokens: int, dtype: torch.dtype):
        self._pools, self._table, self._past, self._tokens, self._dtype = pools, table_P, past, past + tokens, dtype
        position = torch.arange(past, past + tokens, device=table_P.device)
        self.quantized_index = pools.index[0].dtype == torch.uint8
        self._slots = table_P[position // PAGE_TOKENS].long() * PAGE_TOKENS + position % PAGE_TOKENS

    def get_seq_length(self) -> int:
        return self._past

    def append(
        self, layer: int, latent_BSE: Tensor, index_BSD: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Stores the chunk, and gives all entries and keys up to its end as they were stored, (T, E) and (T, D): rounded where they are.

        E4M3 keys come as such, with their scales (T).
        """
        latent, index = self._pools.latent[layer], self._pools.index[layer]
        write_pages(latent, index, latent_BSE[0], None if index_BSD is None else index_BSD[0], self._slots)
        held = latent.index_select(0, self._table)
        if held.dtype == torch.uint8:
            held = torch.cat(quant.unpack_latent_page(held, self._dtype), -1)
        entries = held.flatten(0, 1)[: self._tokens]
        if index_BSD is None:
            return entries, None, None
        keys = index.index_select(0, self._table)
        if keys.dtype != torch.uint8:
            return entries, keys.flatten(0, 1)[: self._tokens], None
        values, scales = quant.unpack_index_page(keys)
        return entries, values.flatten(0, 1)[: self._tokens], scales.flatten()[: self._tokens]


class Runner:
    def __init__(self, model: DecoderForCausalLM, pages: int, backend: str = "auto"):
        self.model, self.backend = model.eval(), backend
        self.pools = make_pools(model, pages)
        self.device = model.device
        self._graphs = Graphs(self._run_step, self.device) if self.device.type == "cuda" else None

    @torch.inference_mode()
    def chunk(
        self, tokens: Sequence[int], past: int, pages: Sequence[int], selection: str, lens: Lens | None = None
    ) -> Tensor:
        """Runs tokens `past` to `past` + S of a prompt, whose pages hold what is before; returns the last one's logits (V).

        lens: takes down what the last one looked at.
        """
        S, T = len(tokens), past + len(tokens)
        table = torch.tensor(pages[: -(-T // PAGE_TOKENS)], dtype=torch.int32, device=self.device)
        ends = torch.arange(past + 1, T + 1, dtype=torch.int32, device=self.device)
        bounds = torch.tensor([0, T], dtype=torch.int32, device=self.device)
        pack = Pack(1, S, (ends - 1).long(), torch.zeros_like(ends), ends, T, T, bounds, T, None)
        selects = resolve(selection)
        if lens is not None:
            selects = lens.over(selects if self.model.is_sparse else dense)
        cache = ChunkCache(self.pools, table, past, S, self.model.dtype)
        ids = torch.tensor(tokens, device=self.device)
        return self._forward(ids, pack, selects, cache=cache, last=True)[0]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], lens: Sequence[int], pages: Sequence[list[int]], selection: str) -> Tensor:
        """Runs one token of each of B sequences, which are `lens` tokens long with it; returns the logits (B, V), until the next step.

        A list in `pages` may grow from call to call, and changes in no other way.
        """
        if self._graphs is not None:
            return self._graphs(tokens, lens, pages, selection)
        padding = -len(lens) % ORDINARY_ROWS
        counts = [-(-n // PAGE_TOKENS) for n in lens]
        inputs = StepInputs(len(lens) + padding, max(counts), self.device)
        inputs.fill(tokens, lens, pages)
        groups = self._groups([*counts, *[1] * padding])
        return self._run_step(inputs, selection, groups, len(lens))[: len(lens)]

    def _run_step(
        self,
        inputs: StepInputs,
        selection: str,
        groups: tuple[tuple[Tensor, int], ...] | None = None,
        real: int | None = None,
    ) -> Tensor:
        (rows, width), lens = inputs.page_table.shape, inputs.lens
        step = PagedStep(self.pools.latent, self.pools.index, inputs.page_table, lens, inputs.slots, groups, real)
        positions = (lens.long() - 1).clamp_min(0)
        pack = Pack(rows, 1, positions, torch.zeros_like(lens), lens, 0, width * PAGE_TOKENS, None, 1, None)
        return self._forward(inputs.tokens, pack, resolve(selection), paged=step)

    def _groups(self, pages: list[int]) -> tuple[tuple[Tensor, int], ...]:
        """Rows by their number of pages."""
        return tuple(
            (torch.tensor([b for b, count in enumerate(pages) if count == some]), some) for some in sorted(set(pages))
        )

    def _forward(
        self,
        tokens: Tensor,
        pack: Pack,
        selection: Selection,
        cache: ChunkCache | None = None,
        paged: PagedStep | None = None,
        last: bool = False,
    ) -> Tensor:
        trunk = self.model.model
        p = Pass(
            pack=pack,
            rotation=trunk.rotation(pack.positions_N),
            selection=selection,
            top_k=trunk.top_k,
            cache=cache,
            paged=paged,
            form=trunk.form,
            backend=self.backend,
        )
        x = trunk.embed_tokens(tokens)
        for layer in trunk.layers:
            x = layer(x, p)
        # the last row in the company of others: alone it would be another product
        x = trunk.norm(x[-ORDINARY_ROWS:] if last else x)
        return self.model.lm_head(x)[-1:] if last else self.model.lm_head(x)


def check_servable(model: DecoderForCausalLM) -> None:
    """UserError for what the paged ops cannot hold."""
    if model.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UserError(f"the engine runs bfloat16, float16 and float32, not {model.dtype}; convert the model")
