"""Rollouts: answers that the engine samples, with all that training needs to see them as the engine did.

Legend: T tokens of prompt and answer, K keys of a query.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Output, Request, Sampling
from tokensieve.engine.core import check
from tokensieve.engine.scheduler import pages_for
from tokensieve.evals.progress import OnProgress
from tokensieve.model import DecoderForCausalLM


@dataclass(frozen=True)
class Rollout:
    """One sampled answer.

    logprobs: natural log probability of each token of the answer under the model, before temperature and cuts. ended:
    the model ended it, instead of running out of tokens. selection: per layer (T - 1, K) int32, the positions that each
    token but the last read, ascending, then -1; empty if the rollout kept none.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool
    selection: tuple[Tensor, ...] = ()


class Rollouts:
    """An engine that samples several answers to each of a batch of prompts, all at once.

    The answers to one prompt read it once. The weights are the model's own: a step of training changes them in place,
    and `sample` forgets what was cached under the old ones. Keys are read in the form in which adaptation reads them.

    tokens: of the longest prompt and answer together. at_once: answers that run together. keep_selection: for
    `replaying`. UserError for a model or sizes that the engine does not take.
    """

    def __init__(
        self,
        model: DecoderForCausalLM,
        tokenizer: Any,
        tokens: int,
        *,
        at_once: int = 128,
        selector: str = "indexer",
        keep_selection: bool = True,
        config: EngineConfig | None = None,
    ):
        config = config or EngineConfig(pages=at_once * (pages_for(tokens) + 1), running=at_once)
        training = model.training
        self.engine = Engine(model, tokenizer, replace(config, form="gathered", keep_selection=keep_selection))
        model.train(training)  # an engine sets it to evaluation
        self._selector = selector

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        samples: int,
        sampling: Sampling,
        seed: int = 0,
        on_progress: OnProgress | None = None,
    ) -> list[list[Rollout]]:
        """`samples` answers to each prompt, the same for the same arguments and weights.

        `sampling.seed` is replaced by one of each answer's own. UserError for a prompt that the engine cannot run, and
        if the engine fails.
        """
        engine, training = self.engine, self.engine.model.training
        engine.scheduler.pool.forget()
        engine.model.eval()
        try:
            found = self._run(prompts, samples, sampling, seed, on_progress)
        finally:
            engine.model.train(training)
        return [
            [_rollout(tuple(prompt), found[f"{place} {sample}"]) for sample in range(samples)]
            for place, prompt in enumerate(prompts)
        ]

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        samples: int,
        sampling: Sampling,
        seed: int,
        on_progress: OnProgress | None,
    ) -> dict[str, list[Output]]:
        """All outputs of each answer, by "PROMPT SAMPLE"."""
        engine = self.engine
        for prompt in prompts:
            check(Request("", tuple(prompt), sampling), engine.longest, engine.model.config.vocab_size)
        found: dict[str, list[Output]] = {}
        for place, prompt in enumerate(prompts):
            for sample in range(samples):
                drawn = replace(sampling, logprobs=0, seed=seed * 1_000_003 + place * samples + sample)
                name = f"{place} {sample}"
                engine.add(Request(name, tuple(prompt), drawn, self._selector))
                found[name] = []
        done = 0
        try:
            while engine.busy:
                for output in engine.step():
                    found[output.id].append(output)
                    if output.finish == "error":
                        raise UserError(f"the rollout of prompt {output.id.split()[0]} failed: {output.error}")
                    if output.finish is not None:
                        done += 1
                        if on_progress is not None:
                            on_progress("rollouts", done, len(found))
        finally:
            for name in found:  # those that have not ended
                engine.abort(name)
        return found


def _rollout(prompt: tuple[int, ...], outputs: Sequence[Output]) -> Rollout:
    told = [entry for output in outputs for entry in output.logprobs]
    answer = tuple(token for output in outputs for token in output.tokens)
    last = outputs[-1]
    return Rollout(prompt, answer, tuple(entry.logprob for entry in told), last.finish == "stop", last.selection)
