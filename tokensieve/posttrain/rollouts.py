"""Rollouts: answers that the engine samples, with all that training needs to see them as the engine did.

An agent's answer goes on after the result of each tool that it called: its turns and the results are one rollout.

Legend: T tokens of prompt and answer, K keys of a query.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Output, Request, Sampling
from tokensieve.engine.scheduler import pages_for
from tokensieve.evals.progress import OnProgress
from tokensieve.machine import usable_cores
from tokensieve.model import DecoderForCausalLM

GPU_CHUNK = 2048  # tokens of a prompt that a GPU reads at once
NEXT_TURN = 1 << 40  # what parts the seeds of an answer's turns: above those of all answers

# Of a prompt and the turns that a model wrote behind it: the tokens up to its next turn; None if the episode is over.
# Several are asked at once, in threads.
Respond = Callable[[tuple[int, ...], Sequence[tuple[int, ...]]], Sequence[int] | None]


@dataclass(frozen=True)
class Rollout:
    """One sampled answer.

    logprobs: natural log probability of each token that the model wrote, under the model, before temperature and cuts.
    ended: the model ended it, instead of running out of tokens. selection: (layers, T - 1, K) int32, the positions that
    each token but the last read, ascending, then -1, in parts along T; samples of a prompt share the first part. Empty
    if the rollout kept none. written: for each token of the answer, whether the model wrote it; empty if it wrote all.
    The others are results of tools.
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
    """A rollout that is under way. sampling: of its next turn."""

    name: str
    prompt: tuple[int, ...]
    sampling: Sampling
    turns: list[tuple[int, ...]] = field(default_factory=list)  # of the model
    answer: list[int] = field(default_factory=list)
    written: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    selection: tuple[Tensor, ...] = ()

    def add_turn(self, outputs: Sequence[Output]) -> None:
        turn = tuple(token for output in outputs for token in output.tokens)
        self.turns.append(turn)
        self._extend(turn, written=True)
        self.logprobs += [entry.logprob for output in outputs for entry in output.logprobs]
        self.ended, self.selection = outputs[-1].finish == "stop", outputs[-1].selection

    def add_result(self, result: Sequence[int], room: int, results: float) -> bool:
        """Whether there is room for another turn behind the result. If not, the episode is cut off before it.

        room: for all tokens of prompt and answer. results: tokens of all results together, at most.
        """
        most = min(
            self.sampling.max_tokens - len(self.turns[-1]), room - len(self.prompt) - len(self.answer) - len(result)
        )
        if most < 1 or self.written.count(False) + len(result) > results:
            self.ended = False
            return False
        self._extend(result, written=False)
        least, seed = min(self.sampling.min_tokens, most), (self.sampling.seed or 0) + NEXT_TURN
        self.sampling = replace(self.sampling, max_tokens=most, min_tokens=least, seed=seed)
        return True

    def _extend(self, tokens: Sequence[int], written: bool) -> None:
        self.answer += tokens
        self.written += [written] * len(tokens)

    def rollout(self) -> Rollout:
        written = () if all(self.written) else tuple(self.written)
        return Rollout(self.prompt, tuple(self.answer), tuple(self.logprobs), self.ended, self.selection, written)


def rollout_config(tokens: int, at_once: int, device: torch.device) -> EngineConfig:
    """The engine of `at_once` answers of `tokens` tokens with their prompts.

    Nobody waits for a first token, so a step reads a chunk of every prompt that the scheduler considers, 32 new ones
    at most; answers go on meanwhile. A GPU reads prompts in longer chunks, since a short one leaves it idle.
    """
    chunk = EngineConfig.chunk if device.type == "cpu" else GPU_CHUNK
    return EngineConfig(pages=at_once * (pages_for(tokens) + 1), running=at_once, chunk=chunk, chunks=at_once)


def rounded(model: DecoderForCausalLM, dtype: torch.dtype) -> DecoderForCausalLM:
    """A copy that does not learn, with floating-point parameters in `dtype`; head weights of indexers keep theirs."""
    made: dict[int, Any] = {}  # deepcopy's memo, so that nothing is copied in the model's own dtype first
    for name, parameter in model.named_parameters():
        keeps = not parameter.is_floating_point() or name.endswith("weights_proj.weight")  # PEFT puts names before it
        weights = parameter.detach().to(parameter.dtype if keeps else dtype, copy=True)
        made[id(parameter)] = torch.nn.Parameter(weights, requires_grad=False)
    return copy.deepcopy(model, made)


@torch.no_grad()
def copy_weights(source: DecoderForCausalLM, target: DecoderForCausalLM) -> None:
    """Sets parameters and buffers of a copy to those of the model, in its own dtypes."""
    for theirs, own in zip(_tensors(target), _tensors(source), strict=True):
        theirs.copy_(own)


def _tensors(model: DecoderForCausalLM) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


class Rollouts:
    """An engine that samples several answers to each of a batch of prompts, all at once.

    A prompt is read once for all of its answers that run together. `sample` uses the model's weights as they
    are then, and forgets what was cached under older ones. Keys are read in the form in which adaptation reads them.

    dtype: of the weights in the engine. If it is not the model's, the engine has a copy of them, rounded; head weights
    of indexers stay float32. None: bfloat16 for float32 weights on a GPU, as autocast rounds them in training, else the
    model's own.
    tokens: of the longest prompt and answer together, results of tools included. result_tokens: of the results in one
    answer, at most, so that it is cut off at the same place whatever is sampled beside it; None: all for which there is
    room. at_once: answers that run together.
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
        dtype: torch.dtype | None = None,
        result_tokens: int | None = None,
    ):
        for name, count, least in (("tokens", tokens, 1), ("at_once", at_once, 1), ("result_tokens", result_tokens, 0)):
            if count is not None and count < least:
                raise UserError(f"rollouts: {name} is {count}; it must be at least {least}")
        config = config or rollout_config(tokens, at_once, model.device)
        if dtype is None:
            dtype = torch.bfloat16 if model.device.type == "cuda" and model.dtype == torch.float32 else model.dtype
        training, self._learns = model.training, model
        runs = model if dtype == model.dtype else rounded(model, dtype)
        self.engine = Engine(runs, tokenizer, replace(config, form="gathered", keep_selection=keep_selection))
        model.train(training)  # an engine sets it to evaluation
        self._selector, self._tokens = selector, tokens
        self._results = float("inf") if result_tokens is None else result_tokens

    def check_room(self, prompts: Sequence[Sequence[int]], most: int) -> None:
        """UserError for a prompt that leaves no room for `most` tokens of an answer."""
        longest = max(map(len, prompts), default=0)
        if longest + most > self._tokens:
            raise UserError(
                f"a prompt has {longest} tokens, and with {most} of an answer more than the {self._tokens} that "
                "rollouts have room for; give more tokens, or shorter prompts"
            )

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
        that the engine cannot run, for stop strings, since rollouts have no text, and if the engine fails.
        """
        if samples < 1 or seed < 0:
            raise UserError(f"rollouts: samples is {samples} and seed {seed}; give at least 1, and at least 0")
        if sampling.stop:
            raise UserError("rollouts have no text to find stop strings in; leave them out of sampling")
        engine, training = self.engine, self.engine.model.training
        engine.scheduler.pool.forget()
        if engine.model is not self._learns:
            copy_weights(self._learns, engine.model)
        engine.model.eval()
        episodes = []
        for number in range(len(prompts) * samples):
            place = number // samples
            drawn = replace(sampling, logprobs=0, detokenize=False, seed=seed * 1_000_003 + number)
            episodes.append(Episode(f"{place} {number % samples}", tuple(prompts[place]), drawn))
        try:
            going = episodes
            while going:
                asked = [Request(e.name, (*e.prompt, *e.answer), e.sampling, self._selector) for e in going]
                outputs = self._run(asked, on_progress)
                for episode in going:
                    episode.add_turn(outputs[episode.name])
                going = [] if respond is None else self._answered(going, respond)
        finally:
            engine.model.train(training)
        done = [episode.rollout() for episode in episodes]
        return [done[place * samples : (place + 1) * samples] for place in range(len(prompts))]

    def _answered(self, episodes: Sequence[Episode], respond: Respond) -> list[Episode]:
        """The episodes that go on, with the results of their calls."""
        ended = [episode for episode in episodes if episode.ended]
        with ThreadPoolExecutor(usable_cores() or 1) as pool:
            results = [*pool.map(lambda episode: respond(episode.prompt, episode.turns), ended)]
        going, room = [], min(self._tokens, self.engine.longest)
        for episode, result in zip(ended, results, strict=True):
            if result is not None and episode.add_result(result, room, self._results):
                going.append(episode)
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
