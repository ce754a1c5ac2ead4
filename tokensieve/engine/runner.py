"""Passes of the model over the cache's pages: a chunk of one prompt or of each of several, or one token of every
sequence.

Legend: S tokens of a pass, T keys of a pass, B sequences, P pages, V vocabulary.

A row's numbers do not depend on what runs beside it; on the CPU they are the same to the bit. For that, the chunks of
different prompts run apart there, unless `EngineConfig.pass_tokens` is set, and the chunks of a prompt always begin at
the same tokens. The rows of a step are padded to a multiple of four, since matrix libraries treat the rows left over
otherwise.
"""

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.engine.graphs import Graphs, StepInputs
from tokensieve.engine.selected_pages import SelectedPages
from tokensieve.families import Entry, family_of
from tokensieve.model import DecoderForCausalLM, ForwardOptions
from tokensieve.model.context import Form, Trace
from tokensieve.model.entries import Entries
from tokensieve.model.moe import ORDINARY_ROWS
from tokensieve.model.pack import Pack
from tokensieve.model.paged import PagedChunk, PagedStep, Pools
from tokensieve.model.selection import Selector, dense, indexer, resolve, sinks, window
from tokensieve.ops import quant
from tokensieve.ops.quant import PAGE_TOKENS

# The entry of a token in quantized pages: MLA's at the published widths.
QUANTIZED_ENTRY = Entry(
    1, quant.LATENT_WIDTH + quant.ROPE_WIDTH, quant.LATENT_WIDTH + quant.ROPE_WIDTH, 0, quant.LATENT_WIDTH
)

# Selectors whose decode steps can be recorded as CUDA graphs. The others read values while they select, or may.
RECORDED = (indexer, window, sinks, dense)


def is_quantized(model: DecoderForCausalLM) -> tuple[bool, bool]:
    """Whether entries, and whether index keys, are stored in FP8.

    Entries are, if the model is on a GPU and they have the widths of the quantized layout. Index keys are, if entries
    are, the keys have the layout's width, and the model's `index_dtype` is "fp8".
    """
    c = model.config
    entries = model.device.type == "cuda" and family_of(c).entry(c) == QUANTIZED_ENTRY
    fp8 = model.is_sparse and getattr(c, "index_dtype", "bf16") == "fp8"
    return entries, entries and fp8 and c.index_head_dim == quant.INDEX_WIDTH


def page_bytes(model: DecoderForCausalLM, kept_keys: int = 0) -> int:
    """Bytes of one page, of all layers together. kept_keys: of each token's selection that is kept beside it."""
    c, size = model.config, torch.finfo(model.dtype).bits // 8
    entries, index = is_quantized(model)
    layer = PAGE_TOKENS * (quant.LATENT_TOKEN_BYTES if entries else family_of(c).entry(c).numbers * size)
    keys = 0
    if model.is_sparse:
        keys = quant.INDEX_PAGE_BYTES if index else PAGE_TOKENS * c.index_head_dim * size
    selected = PAGE_TOKENS * 4 * kept_keys
    return (layer + selected) * c.num_hidden_layers + keys * model.model.indexers


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On the CPU their memory is mapped, so that it is taken page by page when it is first written."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:  # a limit of this process, as ulimit -v sets it
        raise UserError(f"{size} bytes of the cache cannot be had ({error.strerror}); choose fewer pages") from error
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def make_pools(model: DecoderForCausalLM, pages: int) -> Pools:
    """Empty pages for entries, and for the index keys of layers with an indexer, on the model's device."""
    c, device = model.config, model.device
    entries_fp8, index_fp8 = is_quantized(model)

    def pool(*shape: int, quantized: bool = False) -> Tensor:
        return _zeros((pages, *shape), torch.uint8 if quantized else model.dtype, device)

    family = family_of(c)
    entry = family.entry(c)
    widths = (entry.width,) if entry.groups == 1 else (entry.groups, entry.width)
    widths = (quant.LATENT_TOKEN_BYTES,) if entries_fp8 else widths

    def index_pool(layer: int) -> Tensor:
        if not family.has_indexer(c, layer):
            return pool(PAGE_TOKENS, 0)
        return pool(quant.INDEX_PAGE_BYTES, quantized=True) if index_fp8 else pool(PAGE_TOKENS, c.index_head_dim)

    layers = range(c.num_hidden_layers)
    return Pools(
        tuple(pool(PAGE_TOKENS, *widths, quantized=entries_fp8) for _ in layers),
        tuple(index_pool(layer) for layer in layers),
    )


@dataclass(frozen=True)
class Chunk:
    """Tokens of a prompt from its token `past` on.

    pages: pages of the prompt, in order. They hold the entries of the tokens before `past`.
    """

    tokens: Sequence[int]
    past: int
    pages: Sequence[int]

    @property
    def end(self) -> int:
        """Tokens of the prompt up to the chunk's last one."""
        return self.past + len(self.tokens)


class Runner:
    def __init__(
        self,
        model: DecoderForCausalLM,
        pages: int,
        backend: str = "auto",
        selectors: Mapping[str, Selector] = MappingProxyType({}),
        top_k: int = 0,
        check_selection: bool | None = None,
        form: Form = "auto",
        keep_selection: bool = False,
    ):
        """Runner with an empty cache.

        pages: pages of the cache.
        backend: backend of the ops.
        selectors: functions by name, for `chunk` and `step`, besides the names that `resolve` knows.
        top_k: keys selected per query. 0 takes the model's number.
        form: how chunks read their keys; steps on pages always gather.
        keep_selection: whether what each token's attention reads is kept, in `selected`.
        """
        self.model, self.backend, self._selectors, self._top_k = model.eval(), backend, selectors, top_k or None
        self._check_selection, self._form = check_selection, form
        self.pools = make_pools(model, pages)
        self.device = model.device
        self.selected = None
        if keep_selection:
            k = max(model.model.layer_top_k(self._top_k))
            self.selected = SelectedPages(model.config.num_hidden_layers, pages, k, self.device)
        self.entry = family_of(model.config).entry(model.config)
        # In other dtypes experts run one by one, by counts that the host reads, which no graph can record.
        recordable = self.device.type == "cuda" and model.dtype == torch.bfloat16
        self._graphs = Graphs(self._run_step, self.device) if recordable else None

    def selector(self, name: str) -> Selector:
        """Selector of this name. Raises UserError if there is none."""
        return self._selectors[name] if name in self._selectors else resolve(name)

    @torch.inference_mode()
    def chunk(
        self,
        tokens: Sequence[int],
        past: int,
        pages: Sequence[int],
        selector: str,
        trace: Trace | None = None,
        every: bool = False,
    ) -> Tensor:
        """Runs one `Chunk` of these tokens; returns the logits (V) of the last one.

        trace: called with what every layer selects.
        every: whether to return the logits of all tokens (S, V) instead.
        """
        x = self._run_chunks([Chunk(tokens, past, pages)], selector, trace)
        # The last row is multiplied together with others: alone, it would be another kind of product, with other bits.
        last_V = self.model.lm_head(x[-ORDINARY_ROWS:])[-1]
        return torch.cat((self.model.lm_head(x[:-1]), last_V[None])) if every else last_V

    @torch.inference_mode()
    def chunks(self, chunks: Sequence[Chunk], selector: str) -> Tensor:
        """Runs chunks of several prompts in one pass; returns the logits (B, V) of the last token of each."""
        x = self._run_chunks(chunks, selector)
        last = torch.tensor([n - 1 for n in accumulate(len(chunk.tokens) for chunk in chunks)], device=self.device)
        return self.model.lm_head(x[last])

    def _run_chunks(self, chunks: Sequence[Chunk], selector: str, trace: Trace | None = None) -> Tensor:
        """Hidden states (S, D) of the chunks' tokens. The keys of a pass are all tokens so far, prompt by prompt."""
        several, ends = len(chunks) > 1, [chunk.end for chunk in chunks]
        bounds = [0, *accumulate(ends)]  # the first key of each prompt, and the number of keys
        ids = np.concatenate([np.asarray(chunk.tokens) for chunk in chunks])
        positions = np.concatenate([np.arange(chunk.past, chunk.end) for chunk in chunks])
        starts = np.repeat(bounds[:-1], [len(chunk.tokens) for chunk in chunks])
        # One copy brings all of it to the device.
        ids_S, positions_S, starts_S, ends_S = torch.tensor(
            np.stack((ids, positions, starts, starts + positions + 1)), dtype=torch.int32, device=self.device
        )
        whole = not several or not any(chunk.past for chunk in chunks)
        pack = Pack(
            batch=1,
            length=len(positions),
            positions_N=positions_S.long(),
            starts_N=starts_S,
            ends_N=ends_S,
            row_keys=bounds[-1],
            max_keys=max(ends),
            bounds=torch.tensor(bounds, dtype=torch.int32, device=self.device) if whole else None,
            longest=max(ends),
            valid_N=None,
        )
        tables = [chunk.pages[: -(-chunk.end // PAGE_TOKENS)] for chunk in chunks]
        table = torch.tensor([page for pages in tables for page in pages], dtype=torch.int32, device=self.device)
        places = None
        if several:  # the prompts' last pages are not full
            begins = [PAGE_TOKENS * n for n in accumulate(map(len, tables), initial=0)]
            rows = [np.arange(begin, begin + end) for begin, end in zip(begins, ends, strict=False)]
            places = torch.tensor(np.concatenate(rows), device=self.device)
        entries = PagedChunk(self.pools, table, places, pack, self.entry, self.model.dtype, self.backend)
        return self._forward(
            ids_S,
            pack,
            entries,
            self.selector(selector),
            entries.slots,
            trace=trace,
            firsts=starts_S if several else None,
        )

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], lengths: Sequence[int], pages: Sequence[list[int]], selector: str) -> Tensor:
        """Runs one token of each of B sequences; returns the logits (B, V), which are valid until the next step.

        lengths: tokens of each sequence, with the new one.
        pages: pages of each sequence. A list may grow from call to call, and must not change in any other way.

        On a GPU a step of a bfloat16 model is recorded as a CUDA graph if the selector is one of `RECORDED`.
        """
        if self._graphs is not None and self.selector(selector) in RECORDED:
            return self._graphs(tokens, lengths, pages, selector)
        padding = -len(lengths) % ORDINARY_ROWS
        inputs = StepInputs(len(lengths) + padding, -(-max(lengths) // PAGE_TOKENS), self.device)
        inputs.fill(tokens, lengths, pages)
        real = len(lengths) if self.device.type == "cpu" else None  # a GPU computes the padding too
        return self._run_step(inputs, selector, real)[: len(lengths)]

    @torch.inference_mode()
    def copy_page(self, page: int, others: Sequence[int]) -> None:
        """Copies all that a page of the cache holds to other pages, in every layer."""
        for pool in (*self.pools.entries, *self.pools.index):
            pool[list(others)] = pool[page].clone()
        if self.selected is not None:
            self.selected.copy(page, others)

    def _run_step(
        self,
        inputs: StepInputs,
        selector: str,
        real: int | None = None,
    ) -> Tensor:
        (rows, width), lengths = inputs.page_table.shape, inputs.lengths
        step = PagedStep(
            pools=self.pools,
            entry=self.entry,
            page_table=inputs.page_table,
            lengths=lengths,
            slots=inputs.slots,
            real=real,
            backend=self.backend,
        )
        pack = Pack(
            batch=rows,
            length=1,
            positions_N=(lengths.long() - 1).clamp_min(0),
            starts_N=step.starts,
            ends_N=lengths,
            row_keys=0,
            max_keys=width * PAGE_TOKENS,
            bounds=None,
            longest=1,
            valid_N=None,
        )
        x = self._forward(inputs.tokens, pack, step, self.selector(selector), inputs.slots, real=real)
        return self.model.lm_head(x)

    def _forward(
        self,
        tokens: Tensor,
        pack: Pack,
        entries: Entries,
        selector: Selector,
        slots: Tensor,
        trace: Trace | None = None,
        real: int | None = None,
        firsts: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (S, D) of the tokens, which the head multiplies.

        slots: of their entries. firsts (S): first key of each token's sequence; None if that is 0.
        """
        trunk = self.model.model
        options = ForwardOptions(
            selector=selector,
            top_k=self._top_k,
            form=self._form,
            backend=self.backend,
            check_selection=self._check_selection,
        )
        ctx = trunk.context(pack, entries, options, trace=trace, real=real, keep_indices=self.selected is not None)
        x, results = trunk.run(trunk.embed_tokens(tokens), ctx)
        if self.selected is not None:
            self.selected.write(results, slots, firsts)
        return trunk.norm(x)


def check_servable(model: DecoderForCausalLM) -> None:
    """Raises UserError for a model whose dtype the paged ops do not support."""
    if model.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UserError(f"the engine runs bfloat16, float16 and float32, not {model.dtype}; convert the model")
