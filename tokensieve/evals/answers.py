"""Answers that an arm's engine writes: many questions at once, as they would be served."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Request, Sampling
from tokensieve.engine.core import default_pages
from tokensieve.engine.scheduler import pages_for
from tokensieve.evals.evaluation import Evaluation, Record, answer_of, by_context
from tokensieve.evals.parity import Arm
from tokensieve.evals.progress import OnProgress
from tokensieve.model.selection import resolve
from tokensieve.tasks import Answer, encoder
from tokensieve.tasks.ruler import LongExample, LongTask

RUNNING = 32  # contexts that are read or asked about at once, if the cache has room for them
# Tokens of a prompt that run at once. A GPU wants many, and its fused kernels a prompt that begins with them; on a CPU
# a few do, and more of a context is shared.
CHUNK = {"cpu": 512, "cuda": 8192}


class Answering:
    """An arm's engine, with a cache for prompts of up to `longest` tokens, which any number of tasks may use.

    tokenizer: the model's, of transformers.
    """

    def __init__(self, arm: Arm, tokenizer: Any, longest: int):
        pages = min(default_pages(arm.model, RUNNING), RUNNING * pages_for(longest + 1))
        config = EngineConfig(
            pages=pages, running=RUNNING, chunk=CHUNK[arm.model.device.type], top_k=arm.top_k or 0, check_selection=None
        )
        self._encode = encoder(tokenizer)
        self._engine = Engine(arm.model, tokenizer, config, {"arm": resolve(arm.selection)})
        # Of its own selectors an engine records the steps by their names.
        self._selector = arm.selection if isinstance(arm.selection, str) else "arm"

    def __call__(
        self, task: LongTask, examples: Sequence[LongExample], on_progress: OnProgress | None = None
    ) -> Evaluation:
        """Greedy answers to all examples, scored by the task, each of as many tokens as its example has room for.

        A context is read for its first question. The others find its whole chunks in the cache.

        Raises:
            UserError: a prompt past the model's positions, or that the cache has no room for; logits that are not
                finite; a selector that breaks its contract.
        """
        contexts, tokens = deque(by_context(examples)), {place: list[int]() for place in range(len(examples))}
        answers: dict[int, Answer] = {}
        others: dict[int, list[int]] = {}  # of a context's first question
        running = 0
        while len(answers) < len(examples):
            while contexts and running < RUNNING:
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
        self._engine.add(Request(str(place), prompt, sampling, self._selector))
