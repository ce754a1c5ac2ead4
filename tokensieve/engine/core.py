"""The engine: requests in, tokens and text out, one step at a time.

Only one thread may call it. `service.py` serves many callers through that thread.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.engine.detokenizer import Detokenizer
from tokensieve.engine.grammar import Grammars, Matcher
from tokensieve.engine.request import Finish, Output, Request, TokenLogprob
from tokensieve.engine.runner import Runner, check_servable, page_bytes
from tokensieve.engine.sampling import SamplingRow, choose, logprobs_of
from tokensieve.engine.scheduler import Running, Scheduler, pages_for
from tokensieve.engine.trace import AttentionTrace
from tokensieve.model import DecoderForCausalLM
from tokensieve.model.context import Form
from tokensieve.model.selection import Selector
from tokensieve.ops.quant import PAGE_TOKENS
from tokensieve.tasks import end_tokens

NOT_FINITE = "the model's logits are not finite"


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine.

    pages: size of the cache in pages of 64 tokens. 0 takes a quarter of the free memory, or 85% of a GPU's, but no more
        than `running` full contexts need.
    running: requests that run at once.
    chunk: tokens of a prompt that are run at once, a multiple of 64.
    chunks: chunks of prompts that are run between two tokens of the answers.
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
    prefix_cache: bool = True
    backend: Literal["auto", "reference"] = "auto"
    top_k: int = 0
    check_selection: bool | None = None
    form: Form = "auto"
    keep_selection: bool = False

    def __post_init__(self) -> None:
        if (
            self.pages < 0
            or self.running < 1
            or self.chunks < 1
            or self.top_k < 0
            or self.chunk < PAGE_TOKENS
            or self.chunk % PAGE_TOKENS
        ):
            raise UserError(
                f"engine: pages {self.pages} and top_k {self.top_k} must be 0 or more, "
                f"running {self.running} and chunks {self.chunks} at least 1, "
                f"chunk {self.chunk} a multiple of {PAGE_TOKENS}"
            )


def default_pages(model: DecoderForCausalLM, running: int, processes: int = 1, kept_keys: int = 0) -> int:
    """Number of pages if `EngineConfig.pages` is 0.

    kept_keys: of each token's selection that is kept.
    processes: processes that share the processor's memory. On GPUs each process has a GPU of its own.
    """
    share = 0.85 if model.device.type == "cuda" else 1 / (4 * processes)
    budget = int(_free_memory(model.device) * share)
    full_contexts = running * pages_for(model.config.max_position_embeddings)
    return max(1, min(full_contexts, budget // page_bytes(model, kept_keys)))


def _check_pages(model: DecoderForCausalLM, pages: int, kept_keys: int) -> None:
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


@dataclass
class Generation:
    """State that the engine keeps for a request, besides its tokens."""

    running: Running
    text: Detokenizer
    matcher: Matcher | None
    trace: AttentionTrace | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    # After the prompt, and of the prompt if the engine keeps it: one tensor for all that share it.
    logits_V: Tensor | None = None
    selection: tuple[Tensor, ...] = ()


class Engine:
    def __init__(
        self,
        model: DecoderForCausalLM,
        tokenizer: Any,
        config: EngineConfig | None = None,
        selectors: Mapping[str, Selector] = MappingProxyType({}),
    ):
        """selectors: custom selector functions, by the names under which requests select them."""
        check_servable(model)
        self.config = config or EngineConfig()
        self.model, self.tokenizer = model, tokenizer
        kept = max(model.model.layer_top_k(self.config.top_k or None)) if self.config.keep_selection else 0
        pages = self.config.pages or default_pages(model, self.config.running, kept_keys=kept)
        _check_pages(model, pages, kept)
        self.runner = Runner(
            model,
            pages,
            self.config.backend,
            selectors,
            self.config.top_k,
            self.config.check_selection,
            self.config.form,
            self.config.keep_selection,
        )
        self.scheduler = Scheduler(
            pages, self.config.running, self.config.chunk, self.config.chunks, self.config.prefix_cache
        )
        # tokens of prompt and answer together
        self.longest = min(model.config.max_position_embeddings, pages * PAGE_TOKENS)
        self._grammars = Grammars(tokenizer, model.config.vocab_size)
        self._generations: dict[str, Generation] = {}
        self._ends = end_tokens(model, tokenizer)

    @property
    def cache_size(self) -> str:
        """The cache's size as text: "4096 pages, up to 512.0 MiB", of which a CPU's memory is taken as it is needed."""
        taken = "up to " if self.model.device.type == "cpu" else ""
        return f"{self.scheduler.pool.pages} pages, {taken}{self.runner.pools.bytes / 2**20:.1f} MiB"

    @property
    def top_k(self) -> int | None:
        """Keys that the indexer selects per query, in the mean over the layers; None for a dense model."""
        return (self.config.top_k or self.model.top_k) if self.model.is_sparse else None

    @property
    def busy(self) -> bool:
        return bool(self._generations)

    def add(self, request: Request) -> None:
        """Adds a request. Raises UserError for one that can never run."""
        check(request, self.longest, self.model.config.vocab_size)
        self.runner.selector(request.selector)
        if request.id in self._generations:
            raise UserError(f"there is a request {request.id} already; give each its own id")
        matcher = self._grammars.matcher(request.sampling)
        seed = request.sampling.seed
        running = self.scheduler.add(request, int.from_bytes(os.urandom(8), "little") if seed is None else seed)
        self._generations[request.id] = Generation(running, Detokenizer(self.tokenizer, request.sampling.stop), matcher)

    def abort(self, id: str) -> Output | None:
        """Aborts a request and releases its pages. None if there is no request of this id."""
        generation = self._generations.get(id)
        return None if generation is None else self._end(generation, "abort")

    def fail_all(self, error: str) -> list[Output]:
        """Ends every request with an error, after a step that raised.

        No request is left half done, and nothing that was written to the cache is used again.
        """
        self.scheduler.pool.forget()
        return [self._end(generation, "error", error) for generation in list(self._generations.values())]

    def step(self) -> list[Output]:
        """Runs a few chunks of prompts and one token of every answer; returns the outputs."""
        scheduler, outputs = self.scheduler, self._admit()
        ready = scheduler.prepare_step()
        for selector in dict.fromkeys(r.request.selector for r in ready):
            outputs += self._or_end(self._decode, [r for r in ready if r.request.selector == selector])
        for running in scheduler.next_chunks():
            outputs += self._or_end(self._prefill, [running])
        return outputs

    def _or_end(self, run: Callable[[list[Running]], list[Output]], batch: list[Running]) -> list[Output]:
        """Outputs of `run`, or the end of its requests if a selector broke its contract or a logit is not finite."""
        try:
            return run(batch)
        except UserError as error:
            self.scheduler.pool.forget()  # some layers of their pages are not written
            return [self._end(self._generations[r.request.id], "error", str(error)) for r in batch]

    def _prefill(self, batch: list[Running]) -> list[Output]:
        """Runs a chunk of one prompt."""
        (running,) = batch
        a, b = running.cached, self.scheduler.chunk_of(running)
        generation, sampling, trace = self._generations[running.request.id], running.request.sampling, None
        if running.request.trace and b == running.prompt:
            trace = AttentionTrace()  # again after a preemption too, since a pass with a trace may round otherwise
            generation.trace = None if running.answered else trace
        # A preempted request runs its prompt again, and has had its log probabilities if it has answered.
        scores = sampling.prompt_logprobs is not None and running.answered == 0
        selector = running.request.selector
        logits = self.runner.chunk(running.tokens[a:b], a, running.pages, selector, trace, scores)
        if scores:
            self._score(generation, logits, a)
            logits = logits[-1]
        self.scheduler.ran(running, b)
        if b < running.prompt:
            return [self._reading(running)] if running.request.progress and not running.answered else []
        generation.logits_V = logits.clone()
        if self.runner.selected is not None:
            generation.selection = (self.runner.selected.read(running.pages, b),)
        return self._admit([] if running.answered else [running])  # it begins beside those that share the prompt

    def _admit(self, read: Sequence[Running] = ()) -> list[Output]:
        """Admits waiting requests. Outputs of those that begin at the end of a prompt, as do those in `read`."""
        begun = defaultdict[Running, list[Running]](list, {running: [running] for running in read})
        for running, leader in self.scheduler.admit():
            begun[leader].append(running)
        return [output for leader, batch in begun.items() for output in self._begin(batch, leader)]

    def _begin(self, batch: list[Running], leader: Running) -> list[Output]:
        """Outputs of requests that begin at the end of the prompt that `leader` has run, which may be one of them."""
        others, generation = [r for r in batch if r is not leader], self._generations[leader.request.id]
        if others and leader.prompt % PAGE_TOKENS:
            last = leader.prompt // PAGE_TOKENS
            self.runner.copy_page(leader.pages[last], [other.pages[last] for other in others])
        for other in others:
            its = self._generations[other.request.id]
            its.logits_V, its.selection = generation.logits_V, generation.selection
        assert generation.logits_V is not None  # of a request that has run its prompt
        answering = [r for r in batch if r.request.sampling.max_tokens]
        outputs = [self._end(self._generations[r.request.id], "length") for r in batch if r not in answering]
        logits_BV = generation.logits_V.expand(len(answering), -1)
        return outputs + (self._extend(answering, logits_BV) if answering else [])

    def _reading(self, running: Running) -> Output:
        """Output that reports how much of a prompt has been read."""
        return Output(
            running.request.id,
            "",
            (),
            prompt_tokens=running.prompt,
            read_tokens=running.cached,
            cached_tokens=running.reused,
        )

    def _score(self, generation: Generation, logits_SV: Tensor, past: int) -> None:
        """Adds the log probabilities of the prompt's tokens after each of the S tokens from `past` on."""
        if not logits_SV.isfinite().all():
            raise UserError(NOT_FINITE)
        prompt, alternatives = generation.running.request.prompt, generation.running.request.sampling.prompt_logprobs
        tokens = prompt[past + 1 : past + 1 + len(logits_SV)]
        earlier = generation.prompt_logprobs[: past + 1] or [None]
        generation.prompt_logprobs = [*earlier, *logprobs_of(logits_SV[: len(tokens)], tokens, alternatives or 0)]

    def _decode(self, batch: list[Running]) -> list[Output]:
        """Runs one token of requests with the same selector."""
        lengths, selector = [r.cached + 1 for r in batch], batch[0].request.selector
        logits_BV = self.runner.step([r.tokens[r.cached] for r in batch], lengths, [r.pages for r in batch], selector)
        for running, cached in zip(batch, lengths, strict=True):
            self.scheduler.ran(running, cached)
        # A preempted request is first fed the tokens that it already has, and gets no new one before it has caught up.
        ready = [b for b, running in enumerate(batch) if running.cached == len(running.tokens)]
        return self._extend([batch[b] for b in ready], logits_BV[ready]) if ready else []

    def _extend(self, batch: list[Running], logits_BV: Tensor) -> list[Output]:
        """Outputs of requests that get one more token each, chosen from their logits."""
        finite = logits_BV.isfinite().all(-1).tolist()
        broken = [r for r, is_finite in zip(batch, finite, strict=True) if not is_finite]
        outputs = [self._end(self._generations[r.request.id], "error", NOT_FINITE) for r in broken]
        if broken:
            self.scheduler.pool.forget()  # their pages may hold anything, so they must not be shared
            batch, logits_BV = [r for r in batch if r not in broken], logits_BV[finite]
        generations = [self._generations[r.request.id] for r in batch]
        rows = [
            SamplingRow(
                r.request.sampling,
                r.seed,
                r.answered,
                r.tokens,
                None if generation.matcher is None else generation.matcher.allowed(),
                self._ends if r.answered < r.request.sampling.min_tokens else (),
            )
            for r, generation in zip(batch, generations, strict=True)
        ]
        tokens = self._choose(logits_BV, rows)
        logprobs = _asked_logprobs(logits_BV, tokens, [r.request.sampling.logprobs for r in batch])
        return outputs + [self._append(*row) for row in zip(generations, tokens, logprobs, strict=True)]

    def _choose(self, logits_BV: Tensor, rows: list[SamplingRow]) -> list[int]:
        return choose(logits_BV, rows)

    def _append(self, generation: Generation, token: int, logprobs: tuple[TokenLogprob, ...]) -> Output:
        """Output of a request after `token` is appended to it, which may end it."""
        running, sampling = generation.running, generation.running.request.sampling
        running.tokens.append(token)
        ended = token in self._ends and not sampling.ignore_eos
        if generation.matcher is not None:
            if not generation.matcher.accept(token):
                error = "the JSON schema or grammar is too complex to be followed; simplify it"
                return replace(self._end(generation, "error", error), refused=True)
            ended = ended or generation.matcher.done
        may_stop = running.answered >= sampling.min_tokens
        text = "" if ended and token in self._ends else generation.text.push(token, may_stop)
        if ended or generation.text.stopped:
            return self._end(generation, "stop", text=text, tokens=(token,), logprobs=logprobs)
        if running.answered == sampling.max_tokens or len(running.tokens) >= self.longest:
            return self._end(generation, "length", text=text, tokens=(token,), logprobs=logprobs)
        return self._output(generation, text, (token,), logprobs)

    def _end(
        self,
        generation: Generation,
        finish: Finish,
        error: str = "",
        text: str = "",
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> Output:
        running = generation.running
        selection: tuple[Tensor, ...] = ()
        if self.runner.selected is not None and finish in ("stop", "length"):
            more = self.runner.selected.read(running.pages, running.cached, running.prompt)
            selection = (*generation.selection, more)
        self.scheduler.remove(running)
        del self._generations[running.request.id]
        return self._output(generation, text + generation.text.finish(), tokens, logprobs, finish, error, selection)

    def _output(
        self,
        generation: Generation,
        text: str,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        finish: Finish | None = None,
        error: str = "",
        selection: tuple[Tensor, ...] = (),
    ) -> Output:
        r, trace, generation.trace = generation.running, generation.trace, None
        prompt_logprobs, generation.prompt_logprobs = tuple(generation.prompt_logprobs), []
        return Output(
            id=r.request.id,
            text=text,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish=finish,
            prompt_tokens=r.prompt,
            read_tokens=min(r.cached, r.prompt),
            cached_tokens=r.reused,
            completion_tokens=r.answered,
            error=error,
            trace=() if trace is None else tuple(trace.layers),
            selection=selection,
        )


def _asked_logprobs(
    logits_BV: Tensor, tokens: list[int], alternatives: list[int | None]
) -> list[tuple[TokenLogprob, ...]]:
    """The log probability of each row's token with the row's number of alternatives; nothing if that is None.

    Rows that ask for the same number are read together: on a GPU each reading waits for it.
    """
    found: list[tuple[TokenLogprob, ...]] = [()] * len(tokens)
    for count in {count for count in alternatives if count is not None}:
        rows = [b for b, asked in enumerate(alternatives) if asked == count]
        its = logits_BV if len(rows) == len(tokens) else logits_BV[rows]
        for b, logprob in zip(rows, logprobs_of(its, [tokens[b] for b in rows], count), strict=True):
            found[b] = (logprob,)
    return found


def check(request: Request, longest: int, vocabulary: int) -> None:
    """Raises UserError for a request that an engine with room for `longest` tokens can never run."""
    if not request.prompt:
        raise UserError("the prompt is empty; give at least one token")
    if len(request.prompt) + 1 > longest:
        raise UserError(
            f"the prompt has {len(request.prompt)} tokens, and prompt and answer together have room for {longest}; "
            "shorten it"
        )
    if not 0 <= min(request.prompt) <= max(request.prompt) < vocabulary:
        raise UserError(f"the prompt has tokens outside of the vocabulary of {vocabulary}")
    if any(token >= vocabulary for token, _ in request.sampling.logit_bias):
        raise UserError(f"logit_bias has tokens outside of the vocabulary of {vocabulary}")
