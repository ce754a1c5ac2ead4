"""Runs the model on the cache's pages: a chunk of one prompt, or one token of every sequence.

Legend: S tokens of a chunk, T tokens of a sequence so far, B sequences, P pages, V vocabulary.

Every row's numbers are the same whatever runs beside it, on the CPU to the bit: a chunk holds tokens of one prompt only and begins where
every chunk of that prompt begins, and a step's rows are padded to a multiple of four, since matrix libraries treat a rest of rows
otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.engine.graphs import Graphs, StepInputs
from tokensieve.families import Entry, family_of
from tokensieve.model import DecoderForCausalLM, ForwardOptions
from tokensieve.model.context import Trace
from tokensieve.model.entries import Entries, PagedChunk, PagedStep, Pools
from tokensieve.model.moe import ORDINARY_ROWS
from tokensieve.model.pack import Pack
from tokensieve.model.selection import Selector, is_own, resolve
from tokensieve.ops import quant
from tokensieve.ops.quant import PAGE_TOKENS

# What quantized pages hold of a token: MLA's entry at the published widths.
QUANTIZED_ENTRY = Entry(
    1, quant.LATENT_WIDTH + quant.ROPE_WIDTH, quant.LATENT_WIDTH + quant.ROPE_WIDTH, 0, quant.LATENT_WIDTH
)


def is_quantized(model: DecoderForCausalLM) -> tuple[bool, bool]:
    """Whether entries and index keys are held in FP8: on a GPU, in the layouts' own widths; the keys if the model's indexer wants it."""
    c = model.config
    entries = model.device.type == "cuda" and family_of(c).entry(c) == QUANTIZED_ENTRY
    fp8 = model.is_sparse and getattr(c, "index_dtype", "bf16") == "fp8"
    return entries, entries and fp8 and c.index_head_dim == quant.INDEX_WIDTH


def page_bytes(model: DecoderForCausalLM) -> int:
    """Bytes of one page, all layers together."""
    c, size = model.config, torch.finfo(model.dtype).bits // 8
    entries, index = is_quantized(model)
    layer = PAGE_TOKENS * (quant.LATENT_TOKEN_BYTES if entries else family_of(c).entry(c).numbers * size)
    if model.is_sparse:
        layer += quant.INDEX_PAGE_BYTES if index else PAGE_TOKENS * c.index_head_dim * size
    return layer * c.num_hidden_layers


def make_pools(model: DecoderForCausalLM, pages: int) -> Pools:
    c, device = model.config, model.device
    entries_fp8, index_fp8 = is_quantized(model)

    def pool(*shape: int, quantized: bool) -> Tensor:
        return torch.zeros(pages, *shape, dtype=torch.uint8 if quantized else model.dtype, device=device)

    entry = family_of(c).entry(c)
    widths = (entry.width,) if entry.groups == 1 else (entry.groups, entry.width)
    widths = (quant.LATENT_TOKEN_BYTES,) if entries_fp8 else widths
    index_width = c.index_head_dim if model.is_sparse else 0
    keys = (quant.INDEX_PAGE_BYTES,) if index_fp8 else (PAGE_TOKENS, index_width)
    layers = range(c.num_hidden_layers)
    return Pools(
        tuple(pool(PAGE_TOKENS, *widths, quantized=entries_fp8) for _ in layers),
        tuple(pool(*keys, quantized=index_fp8) for _ in layers),
    )


class Runner:
    def __init__(
        self,
        model: DecoderForCausalLM,
        pages: int,
        backend: str = "auto",
        selectors: Mapping[str, Selector] = MappingProxyType({}),
        top_k: int = 0,
    ):
        """selectors: functions by the names that `chunk` and `step` are given, besides those that `resolve` knows. top_k: 0 is the model's."""
        self.model, self.backend, self._selectors, self._top_k = model.eval(), backend, selectors, top_k or None
        self.pools = make_pools(model, pages)
        self.device = model.device
        self.entry = family_of(model.config).entry(model.config)
        self._graphs = Graphs(self._run_step, self.device) if self.device.type == "cuda" else None

    def selector(self, name: str) -> Selector:
        """UserError for a name that names none."""
        return self._selectors[name] if name in self._selectors else resolve(name)

    @torch.inference_mode()
    def chunk(
        self, tokens: Sequence[int], past: int, pages: Sequence[int], selector: str, trace: Trace | None = None
    ) -> Tensor:
        """Runs tokens `past` to `past` + S of a prompt, whose pages hold what is before; returns the last one's logits (V).

        trace: sees what every layer selects.
        """
        S, T = len(tokens), past + len(tokens)
        table = torch.tensor(pages[: -(-T // PAGE_TOKENS)], dtype=torch.int32, device=self.device)
        ends = torch.arange(past + 1, T + 1, dtype=torch.int32, device=self.device)
        pack = Pack(
            batch=1,
            length=S,
            positions_N=(ends - 1).long(),
            starts_N=torch.zeros_like(ends),
            ends_N=ends,
            row_keys=T,
            max_keys=T,
            bounds=torch.tensor([0, T], dtype=torch.int32, device=self.device),
            longest=T,
            valid_N=None,
        )
        entries = PagedChunk(self.pools, table, pack, self.entry, self.model.dtype, self.backend)
        ids = torch.tensor(tokens, device=self.device)
        # the last row in the company of others: alone it would be another product
        return self._forward(ids, pack, entries, self.selector(selector), trace=trace, rows=ORDINARY_ROWS)[-1]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], lengths: Sequence[int], pages: Sequence[list[int]], selector: str) -> Tensor:
        """Runs one token of each of B sequences, which are `lengths` tokens long with it; returns the logits (B, V), until the next step.

        A list in `pages` may grow from call to call, and changes in no other way. On a GPU a step is recorded as a CUDA graph, but for
        selectors that are not ours: they may look at values, which cannot be recorded.
        """
        if self._graphs is not None and is_own(self.selector(selector)):
            return self._graphs(tokens, lengths, pages, selector)
        padding = -len(lengths) % ORDINARY_ROWS
        counts = [-(-n // PAGE_TOKENS) for n in lengths]
        inputs = StepInputs(len(lengths) + padding, max(counts), self.device)
        inputs.fill(tokens, lengths, pages)
        if self.device.type == "cuda":  # where bits depend on the batch anyway
            return self._run_step(inputs, selector)[: len(lengths)]
        groups = self._groups([*counts, *[1] * padding])
        return self._run_step(inputs, selector, groups, len(lengths))[: len(lengths)]

    def _run_step(
        self,
        inputs: StepInputs,
        selector: str,
        groups: tuple[tuple[Tensor, int], ...] | None = None,
        real: int | None = None,
    ) -> Tensor:
        (rows, width), lengths = inputs.page_table.shape, inputs.lengths
        step = PagedStep(
            pools=self.pools,
            entry=self.entry,
            page_table=inputs.page_table,
            lengths=lengths,
            slots=inputs.slots,
            groups=groups,
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
        return self._forward(inputs.tokens, pack, step, self.selector(selector), real=real)

    def _groups(self, pages: list[int]) -> tuple[tuple[Tensor, int], ...]:
        """Rows by their number of pages."""
        return tuple(
            (torch.tensor([b for b, count in enumerate(pages) if count == size]), size) for size in sorted(set(pages))
        )

    def _forward(
        self,
        tokens: Tensor,
        pack: Pack,
        entries: Entries,
        selector: Selector,
        trace: Trace | None = None,
        real: int | None = None,
        rows: int = 0,
    ) -> Tensor:
        """Logits of the last `rows` tokens, of all if it is 0."""
        trunk = self.model.model
        options = ForwardOptions(selector=selector, top_k=self._top_k, backend=self.backend)
        ctx = replace(trunk.context(pack, entries, options), trace=trace, real=real)
        x, _ = trunk.run(trunk.embed_tokens(tokens), ctx)
        return self.model.lm_head(trunk.norm(x[-rows:]))


def check_servable(model: DecoderForCausalLM) -> None:
    """UserError for what the paged ops cannot hold."""
    if model.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UserError(f"the engine runs bfloat16, float16 and float32, not {model.dtype}; convert the model")
