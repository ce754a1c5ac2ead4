"""Answers that an arm's engine writes: many questions at once, as they would be served."""

import gc
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Request, Sampling
from tokensieve.engine.config import default_pages
from tokensieve.engine.scheduler import pages_for
from tokensieve.evals.evaluation import Evaluation, Record, answer_of, by_context
from tokensieve.evals.parity import Arm
from tokensieve.evals.progress import OnProgress
from tokensieve.model.selection import resolve
from tokensieve.ops.quant import PAGE_TOKENS
from tokensieve.tasks import Answer, encoder
from tokensieve.tasks.ruler import LongExample, LongTask

RUNNING = 32  # contexts that are read or asked about at once, if the cache has room for them
# Tokens of a prompt that run at once, and that two prompts share. A GPU needs many to be busy, and its fused kernels
# run only a prompt's first ones. On a CPU few are enough, and more of a context is shared.
CHUNK = {"cpu": 512, "cuda": 8192}
ARM = "arm"  # the engine's name for the arm's selector


@contextmanager
def answering(arm: Arm, tokenizer: Any, longest: int) -> "Iterator[Answering]":
    """Within the block an arm answers, with a cache for prompts of up to `longest` tokens, answers included.

    Raises:
        UserError: memory for less than one such prompt.
    """
    _free_cache(arm.model.device)  # of those before, so that its memory can be had
    this = Answering(arm, tokenizer, longest)
    try:
        yield this
    finally:
        this.close()
        _free_cache(arm.model.device)


def _free_cache(device: torch.device) -> None:
    gc.collect()  # a cache and its graphs know each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Answering:
    """An arm's engine, which any number of tasks may use. tokenizer: the model's, of transformers."""

    def __init__(self, arm: Arm, tokenizer: Any, longest: int):
        one = pages_for(longest + 1)
        pages = min(default_pages(arm.model, RUNNING), RUNNING * one)
        if pages < one:
            have = pages * PAGE_TOKENS
            raise UserError(f"there is memory for a cache of {have} tokens, not of {longest}; ask in shorter contexts")
        self._contexts = pages // one
        config = EngineConfig(pages, RUNNING, CHUNK[arm.model.device.type], top_k=arm.top_k or 0)
        self._encode = encoder(tokenizer)
        self._engine = Engine(arm.model, tokenizer, config, {ARM: resolve(arm.selection)})

    def close(self) -> None:
        """Gives the engine up."""
        del self._engine

    def __call__(
        self, task: LongTask, examples: Sequence[LongExample], on_progress: OnProgress | None = None
    ) -> Evaluation:
        """Greedy answers to all examples, scored by the task, each of as many tokens as its example has room for.

        A context is read for its first question. The others find its whole chunks (`CHUNK`) in the cache, so that on a
        GPU only long contexts are shared.

        Raises:
            UserError: a prompt past the model's positions, or longer than the cache was made for; logits that are not
                finite; a selector that breaks its contract.
        """
        contexts, tokens = deque(by_context(examples)), {place: list[int]() for place in range(len(examples))}
        answers: dict[int, Answer] = {}
        others: dict[int, list[int]] = {}  # of a context's first question
        running = 0
        while contexts or self._engine.busy:
            while contexts and running < self._contexts:
                first, *others[first] = contexts.popleft()
                self._add(first, examples[first])
                running += 1
            for output in self._engine.step():
                place = int(output.id)
                if output.finish == "error":
                    raise UserError(f"{examples[place].name}: {output.error}")
                for other in others.pop(place, ()):
                    self._add(other, examples[other])
                    running += 1
                tokens[place] += output.tokens
                if output.finish is not None:
                    ended = output.finish == "stop"
                    answers[place] = answer_of(self._encode, tokens[place][: -1 if ended else None], ended)
                    running -= 1
                    if on_progress is not None:
                        on_progress(task.name, len(answers), len(examples))
        pairs = [(example, answers[place]) for place, example in enumerate(examples)]
        return Evaluation(tuple(Record(example, answer, task.score(example, answer)) for example, answer in pairs))

    def _add(self, place: int, example: LongExample) -> None:
        prompt = (*example.context, *self._encode.prompt(example.prompt))
        sampling = Sampling(max_tokens=example.room)
        self._engine.add(Request(str(place), prompt, sampling, ARM))
