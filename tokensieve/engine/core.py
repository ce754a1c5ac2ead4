"""The engine: requests in, tokens and text out, one step at a time.

Only one thread may call it. `service.py` serves many callers through that thread.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.engine.config import PASS_TOKENS, EngineConfig, check_pages, default_pages
from tokensieve.engine.detokenizer import Detokenizer
from tokensieve.engine.grammar import Grammars, Matcher
from tokensieve.engine.request import Finish, Output, Request, TokenLogprob
from tokensieve.engine.runner import Chunk, Runner, check_servable
from tokensieve.engine.sampling import SamplingRow, choose, logprobs_of
from tokensieve.engine.scheduler import Running, Scheduler
from tokensieve.engine.trace import AttentionTrace
from tokensieve.model import DecoderForCausalLM
from tokensieve.model.selection import Selector, is_own
from tokensieve.ops.quant import PAGE_TOKENS
from tokensieve.tasks import end_tokens

NOT_FINITE = "the model's logits are not finite"


@dataclass
class Generation:
    """State that the engine keeps for a request, besides its tokens."""

    running: Running
    text: Detokenizer | None
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
        check_pages(model, pages, kept)
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
        self._pass_tokens = self.config.pass_tokens or (0 if model.device.type == "cpu" else PASS_TOKENS)
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
        text = Detokenizer(self.tokenizer, request.sampling.stop) if request.sampling.detokenize else None
        self._generations[request.id] = Generation(running, text, matcher)

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
        for batch in self._passes(scheduler.next_chunks()):
            outputs += self._or_end(self._prefill, batch)
        return outputs

    def _or_end(self, run: Callable[[list[Running]], list[Output]], batch: list[Running]) -> list[Output]:
        """Outputs of `run`. If a selector breaks its contract or scores are not finite, the request ends. One of
        several is found by running each alone: nothing that has failed has changed them.
        """
        try:
            return run(batch)
        except UserError as error:
            self.scheduler.pool.forget()  # some layers of their pages are not written
            if len(batch) > 1:
                return [output for running in batch for output in self._or_end(run, [running])]
            return [self._end(self._generations[batch[0].request.id], "error", str(error))]

    def _passes(self, chosen: Sequence[Running]) -> list[list[Running]]:
        """The prompts that run a chunk, in the passes in which they do. What counts is keys: a pass makes them all."""
        passes: list[list[Running]] = []
        room = 0
        for running in chosen:
            keys, shares = self.scheduler.chunk_end(running), self._may_share(running)
            if shares and keys <= room and passes[-1][0].request.selector == running.request.selector:
                passes[-1].append(running)
                room -= keys
            else:
                passes.append([running])
                room = self._pass_tokens - keys if shares else 0
        return passes

    def _may_share(self, running: Running) -> bool:
        """Whether a request's chunk may share a pass. A trace and log probabilities of the prompt need one of their
        own, and so does a selector of the user's, whose mistakes would read the keys of another prompt.
        """
        request = running.request
        return not (request.trace or self._scores(running)) and is_own(self.runner.selector(request.selector))

    def _scores(self, running: Running) -> bool:
        """Whether log probabilities of the prompt are due. A preempted request that has answered has had its own."""
        return running.request.sampling.prompt_logprobs is not None and running.answered == 0

    def _prefill(self, batch: list[Running]) -> list[Output]:
        """Runs a chunk of each of these prompts, in one pass."""
        chunks = [Chunk(r.tokens[r.cached : self.scheduler.chunk_end(r)], r.cached, r.pages) for r in batch]
        if len(batch) == 1:
            logits_BV = self._prefill_alone(batch[0], chunks[0])[None]
        else:
            logits_BV = self.runner.chunks(chunks, batch[0].request.selector)
        outputs, read = [], []
        for running, chunk, logits_V in zip(batch, chunks, logits_BV, strict=True):
            self.scheduler.ran(running, chunk.end)
            if running.in_prompt:
                outputs += [self._reading(running)] if running.request.progress and not running.answered else []
                continue
            generation = self._generations[running.request.id]
            generation.logits_V = logits_V.clone()
            if self.runner.selected is not None:
                generation.selection = (self.runner.selected.read(running.pages, chunk.end),)
            read.append(running)
        return outputs + self._admit(read) if read else outputs

    def _prefill_alone(self, running: Running, chunk: Chunk) -> Tensor:
        """Logits (V) of a chunk's last token, of a request that may want more of its pass."""
        generation, trace = self._generations[running.request.id], None
        if running.request.trace and chunk.end == running.prompt:
            trace = AttentionTrace()  # again after a preemption too, since a pass with a trace may round otherwise
            generation.trace = None if running.answered else trace
        scores = self._scores(running)
        logits = self.runner.chunk(chunk.tokens, chunk.past, chunk.pages, running.request.selector, trace, scores)
        if not scores:
            return logits
        self._score(generation, logits, chunk.past)
        return logits[-1]

    def _admit(self, read: Sequence[Running] = ()) -> list[Output]:
        """Admits waiting requests. First outputs of those that begin at the end of a prompt that another one has run,
        and of those in `read`, unless they have answered before.
        """
        begin = [r for r in read if not r.answered]
        others = defaultdict[Running, list[Running]](list)
        for running, leader in self.scheduler.admit():
            others[leader].append(running)
            begin.append(running)
        for leader, followers in others.items():
            self._share(leader, followers)
        answering = [r for r in begin if r.request.sampling.max_tokens]
        outputs = [self._end(self._generations[r.request.id], "length") for r in begin if r not in answering]
        if not answering:
            return outputs
        return outputs + self._extend(answering, torch.stack([self._prompt_logits(r) for r in answering]))

    def _share(self, leader: Running, others: Sequence[Running]) -> None:
        """Gives requests what the end of the prompt left that `leader` has run: their last page, logits, selections."""
        if leader.prompt % PAGE_TOKENS:
            last = leader.prompt // PAGE_TOKENS
            self.runner.copy_page(leader.pages[last], [other.pages[last] for other in others])
        generation = self._generations[leader.request.id]
        for other in others:
            its = self._generations[other.request.id]
            its.logits_V, its.selection = generation.logits_V, generation.selection

    def _prompt_logits(self, running: Running) -> Tensor:
        """Logits (V) at the end of a prompt that has been run."""
        logits_V = self._generations[running.request.id].logits_V
        assert logits_V is not None
        return logits_V

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
        text = ""
        if generation.text is not None and not (ended and token in self._ends):
            text = generation.text.push(token, may_stop=running.answered >= sampling.min_tokens)
            ended = ended or generation.text.stopped
        if ended:
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
        text += "" if generation.text is None else generation.text.finish()
        return self._output(generation, text, tokens, logprobs, finish, error, selection)

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
