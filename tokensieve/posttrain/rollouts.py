"""Rollouts: answers that the engine samples, with all that training needs to see them as the engine did.

An agent's answer goes on after the result of each tool that it called: its turns and the results are one rollout.

Legend: T tokens of prompt and answer, K keys of a query.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Output, Request, Sampling
from tokensieve.engine.scheduler import pages_for
from tokensieve.evals.progress import OnProgress
from tokensieve.machine import usable_cores
from tokensieve.model import DecoderForCausalLM

# Of a prompt and the turns that a model wrote behind it: the tokens up to its next turn; None if the episode is over.
# Several are asked at once, in threads.
Respond = Callable[[tuple[int, ...], Sequence[tuple[int, ...]]], Sequence[int] | None]


@dataclass(frozen=True)
class Rollout:
    """One sampled answer.

    logprobs: natural log probability of each token that the model wrote, under the model, before temperature and cuts.
    ended: the model ended it, instead of running out of tokens. selection: per layer (T - 1, K) int32, the positions
    that each token but the last read, ascending, then -1; empty if the rollout kept none. written: for each token of
    the answer, whether the model wrote it; empty if it wrote all. The others are results of tools.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool
    selection: tuple[Tensor, ...] = ()
    written: tuple[bool, ...] = ()

    @property
    def mask(self) -> tuple[bool, ...]:
        """`written`, never empty but for an empty answer."""
        return self.written or (True,) * len(self.answer)


@dataclass
class Episode:
    """A rollout that is under way."""

    prompt: tuple[int, ...]
    turns: list[tuple[int, ...]] = field(default_factory=list)  # of the model
    answer: list[int] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    selection: tuple[Tensor, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.answer)

    def add_turn(self, outputs: Sequence[Output]) -> None:
        turn = tuple(token for output in outputs for token in output.tokens)
        self.turns.append(turn)
        self._extend(turn, written=True)
        self.logprobs += [entry.logprob for output in outputs for entry in output.logprobs]
        self.ended, self.selection = outputs[-1].finish == "stop", outputs[-1].selection

    def add_result(self, result: Sequence[int]) -> None:
        self._extend(result, written=False)

    def _extend(self, tokens: Sequence[int], written: bool) -> None:
        self.answer += tokens
        self.written += [written] * len(tokens)

    def rollout(self) -> Rollout:
        written = () if all(self.written) else tuple(self.written)
        return Rollout(self.prompt, tuple(self.answer), tuple(self.logprobs), self.ended, self.selection, written)


class Rollouts:
    """An engine that samples several answers to each of a batch of prompts, all at once.

    The answers to one prompt read it once. The weights are the model's own: a step of training changes them in place,
    and `sample` forgets what was cached under the old ones. Keys are read in the form in which adaptation reads them.

    tokens: of the longest prompt and answer together, results of tools included. at_once: answers that run together.
    keep_selection: for `replaying`. UserError for a model or sizes that the engine does not take.
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
        self._selector, self._tokens = selector, tokens

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        samples: int,
        sampling: Sampling,
        seed: int = 0,
        on_progress: OnProgress | None = None,
        respond: Respond | None = None,
    ) -> list[list[Rollout]]:
        """`samples` answers to each prompt, the same for the same arguments and weights.

        `sampling.seed` is replaced by one of each turn's own; `sampling.max_tokens` is for all turns of an answer.
        respond: gives the results of tools. Every answer that ended is offered to it, and goes on if there is one. An
        answer whose result has no room, or leaves none for another turn, is cut off before it. UserError for a prompt
        that the engine cannot run, and if the engine fails.
        """
        engine, training = self.engine, self.engine.model.training
        engine.scheduler.pool.forget()
        engine.model.eval()
        episodes = {
            f"{place} {i}": Episode(tuple(prompt)) for place, prompt in enumerate(prompts) for i in range(samples)
        }
        seeds = {name: seed * 1_000_003 + number for number, name in enumerate(episodes)}
        try:
            going = dict.fromkeys(episodes, sampling)
            while going:
                requests = []
                for name, limited in going.items():
                    episode = episodes[name]
                    drawn = replace(limited, logprobs=0, seed=seeds[name] + (len(episode.turns) << 40))
                    requests.append(Request(name, (*episode.prompt, *episode.answer), drawn, self._selector))
                for name, outputs in self._run(requests, on_progress).items():
                    episodes[name].add_turn(outputs)
                going = (
                    {} if respond is None else self._go_on({name: episodes[name] for name in going}, sampling, respond)
                )
        finally:
            engine.model.train(training)
        done = iter(episodes.values())
        return [[next(done).rollout() for _ in range(samples)] for _ in prompts]

    def _go_on(self, episodes: Mapping[str, Episode], sampling: Sampling, respond: Respond) -> dict[str, Sampling]:
        """The sampling of the next turn, by name, of the episodes that go on. They have got their results."""
        ended = {name: episode for name, episode in episodes.items() if episode.ended}
        with ThreadPoolExecutor(usable_cores() or 1) as pool:
            results = [*pool.map(lambda episode: respond(episode.prompt, episode.turns), ended.values())]
        room, going = min(self._tokens, self.engine.longest), {}
        for (name, episode), result in zip(ended.items(), results, strict=True):
            if result is None:
                continue
            most = min(sampling.max_tokens - len(episode.logprobs), room - episode.tokens - len(result))
            if most < 1:
                episode.ended = False
            else:
                episode.add_result(result)
                going[name] = replace(sampling, max_tokens=most, min_tokens=min(sampling.min_tokens, most))
        return going

    def _run(self, requests: Sequence[Request], on_progress: OnProgress | None) -> dict[str, list[Output]]:
        """All outputs of each request, by its id."""
        engine = self.engine
        found: dict[str, list[Output]] = {request.id: [] for request in requests}
        done = 0
        try:
            for request in requests:
                engine.add(request)
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
