"""The engine: requests in, tokens and text out, a step at a time. One thread calls it; `service.py` brings many callers together."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from tokensieve.model.selection import Selector
from tokensieve.ops.quant import PAGE_TOKENS

log = logging.getLogger("tokensieve.engine")


@dataclass(frozen=True)
class EngineConfig:
    """pages: of 64 tokens, in the cache; 0: a quarter of the free memory, or 85% of a GPU's, and no more than `running` full contexts.
    running: requests at once. chunk: tokens of a prompt run at once, a multiple of 64. chunks: so many of them between two tokens of the
    answers. prefix_cache: prompts that begin alike share the pages of their beginning. backend: of the ops. top_k: keys selected per query;
    0: as many as the model's config says."""

    pages: int = 0
    running: int = 64
    chunk: int = 512
    chunks: int = 2
    prefix_cache: bool = True
    backend: Literal["auto", "reference"] = "auto"
    top_k: int = 0

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
                f"engine: pages {self.pages} and top_k {self.top_k} must be 0 or more, running {self.running} and chunks {self.chunks} at least 1, "
                f"chunk {self.chunk} a multiple of {PAGE_TOKENS}"
            )


def default_pages(model: DecoderForCausalLM, running: int, processes: int = 1) -> int:
    """As `EngineConfig.pages` says; so many processes share the processor's memory, and have a GPU each."""
    if model.device.type == "cuda":
        room = int(torch.cuda.mem_get_info(model.device)[0] * 0.85)
    else:
        room = psutil.virtual_memory().available // (4 * processes)
    wanted = running * pages_for(model.config.max_position_embeddings)
    return max(1, min(wanted, room // page_bytes(model)))


@dataclass
class Generation:
    """What the engine keeps of a request besides its tokens."""

    running: Running
    text: Detokenizer
    matcher: Matcher | None
    trace: AttentionTrace | None = None


class Engine:
    def __init__(
        self,
        model: DecoderForCausalLM,
        tokenizer: Any,
        config: EngineConfig | None = None,
        selectors: Mapping[str, Selector] = MappingProxyType({}),
    ):
        """selectors: functions of your own by the names that requests call them."""
        check_servable(model)
        self.config = config or EngineConfig()
        self.model, self.tokenizer = model, tokenizer
        pages = self.config.pages or default_pages(model, self.config.running)
        self.runner = Runner(model, pages, self.config.backend, selectors, self.config.top_k)
        self.scheduler = Scheduler(
            pages, self.config.running, self.config.chunk, self.config.chunks, self.config.prefix_cache
        )
        self.longest = min(model.config.max_position_embeddings, pages * PAGE_TOKENS)  # tokens of prompt and answer
        self._grammars = Grammars(tokenizer, model.config.vocab_size)
        self._generations: dict[str, Generation] = {}
        ends = {tokenizer.eos_token_id, *self._also_ends()}
        self._ends = {end for end in ends if end is not None}
        log.info("cache: %d pages, %.1f MiB", pages, self.runner.pools.bytes / 2**20)

    def _also_ends(self) -> list[int | None]:
        named = getattr(self.model.generation_config, "eos_token_id", None)
        return named if isinstance(named, list) else [named]

    @property
    def busy(self) -> bool:
        return bool(self._generations)

    def add(self, request: Request) -> None:
        """Takes a request in. UserError for one that can never run."""
        check(request, self.longest, self.model.config.vocab_size)
        self.runner.selector(request.selector)
        if request.id in self._generations:
            raise UserError(f"there is a request {request.id} already; give each its own id")
        matcher = self._grammars.matcher(request.sampling)
        seed = request.sampling.seed
        running = self.scheduler.add(request, int.from_bytes(os.urandom(8), "little") if seed is None else seed)
        self._generations[request.id] = Generation(running, Detokenizer(self.tokenizer, request.sampling.stop), matcher)

    def abort(self, id: str) -> Output | None:
        """Ends a request; its pages come back. None where there is none of this id."""
        answer = self._generations.get(id)
        return None if answer is None else self._end(answer, "abort")

    def fail_all(self, error: str) -> list[Output]:
        """Ends every request with an error, after a step that raised: none is left half done, and what it wrote is not used again."""
        self.scheduler.pool.forget()
        return [self._end(answer, "error", error) for answer in list(self._generations.values())]

    def step(self) -> list[Output]:
        """Runs a few chunks of prompts and one token of every answer; what came of it."""
        scheduler, outputs = self.scheduler, []
        scheduler.admit()
        ready = scheduler.prepare_step()
        for selector in dict.fromkeys(r.request.selector for r in ready):
            outputs += self._decode([r for r in ready if r.request.selector == selector], selector)
        for running in scheduler.next_chunks():
            a, b = running.cached, scheduler.chunk_of(running)
            trace = None
            if running.request.trace and b == running.prompt:
                trace = self._generations[running.request.id].trace = AttentionTrace()
            logits_V = self.runner.chunk(running.tokens[a:b], a, running.pages, running.request.selector, trace)
            scheduler.ran(running, b)
            if b == running.prompt and running.answered == 0:
                outputs += self._extend([running], logits_V[None])
        return outputs

    def _decode(self, some: list[Running], selector: str) -> list[Output]:
        lengths = [r.cached + 1 for r in some]
        logits_BV = self.runner.step([r.tokens[r.cached] for r in some], lengths, [r.pages for r in some], selector)
        for running, cached in zip(some, lengths, strict=True):
            self.scheduler.ran(running, cached)
        # one that was interrupted is fed what it had said before
        new = [b for b, running in enumerate(some) if running.cached == len(running.tokens)]
        return self._extend([some[b] for b in new], logits_BV[new]) if new else []

    def _extend(self, some: list[Running], logits_BV: Tensor) -> list[Output]:
        sound = logits_BV.isfinite().all(-1).tolist()
        broken = [r for r, is_sound in zip(some, sound, strict=True) if not is_sound]
        outputs = [
            self._end(self._generations[r.request.id], "error", "the model's logits are not finite") for r in broken
        ]
        if broken:
            self.scheduler.pool.forget()  # who knows what their pages hold
            some, logits_BV = [r for r in some if r not in broken], logits_BV[sound]
        answers = [self._generations[r.request.id] for r in some]
        rows = [
            SamplingRow(
                r.request.sampling,
                r.seed,
                r.answered,
                r.tokens,
                None if answer.matcher is None else answer.matcher.allowed(),
            )
            for r, answer in zip(some, answers, strict=True)
        ]
        tokens = self._choose(logits_BV, rows)
        return outputs + [
            self._say(answer, token, logits_V)
            for answer, token, logits_V in zip(answers, tokens, logits_BV, strict=True)
        ]

    def _choose(self, logits_BV: Tensor, rows: list[SamplingRow]) -> list[int]:
        return choose(logits_BV, rows)

    def _say(self, answer: Generation, token: int, logits_V: Tensor) -> Output:
        running, sampling = answer.running, answer.running.request.sampling
        logprobs = () if sampling.logprobs is None else (logprobs_of(logits_V, token, sampling.logprobs),)
        running.tokens.append(token)
        ended = token in self._ends and not sampling.ignore_eos
        if answer.matcher is not None:
            if not answer.matcher.accept(token):
                error = "the JSON schema or grammar asks for more than can be followed"
                return replace(self._end(answer, "error", error), refused=True)
            ended = ended or answer.matcher.done
        text = "" if ended and token in self._ends else answer.text.push(token)
        if ended or answer.text.stopped:
            return self._end(answer, "stop", text=text, tokens=(token,), logprobs=logprobs)
        if running.answered == sampling.max_tokens or len(running.tokens) >= self.longest:
            return self._end(answer, "length", text=text, tokens=(token,), logprobs=logprobs)
        return self._output(answer, text, (token,), logprobs)

    def _end(
        self,
        answer: Generation,
        finish: Finish,
        error: str = "",
        text: str = "",
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> Output:
        self.scheduler.remove(answer.running)
        del self._generations[answer.running.request.id]
        return self._output(answer, text + answer.text.finish(), tokens, logprobs, finish, error)

    def _output(
        self,
        answer: Generation,
        text: str,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        finish: Finish | None = None,
        error: str = "",
    ) -> Output:
        r, trace, answer.trace = answer.running, answer.trace, None
        return Output(
            id=r.request.id,
            text=text,
            tokens=tokens,
            logprobs=logprobs,
            finish=finish,
            prompt_tokens=r.prompt,
            cached_tokens=r.found,
            completion_tokens=r.answered,
            error=error,
            trace=() if trace is None else tuple(trace.layers),
        )


def check(request: Request, longest: int, vocabulary: int) -> None:
    """UserError for a request that an engine with room for `longest` tokens can never run."""
    if not request.prompt:
        raise UserError("the prompt is empty; give at least one token")
    if len(request.prompt) + 1 > longest:
        raise UserError(
            f"the prompt has {len(request.prompt)} tokens, and prompt and answer together have room for {longest}; shorten it"
        )
    if not 0 <= min(request.prompt) <= max(request.prompt) < vocabulary:
        raise UserError(f"the prompt names tokens outside of the vocabulary of {vocabulary}")
    if any(token >= vocabulary for token, _ in request.sampling.logit_bias):
        raise UserError(f"logit_bias names tokens outside of the vocabulary of {vocabulary}")
