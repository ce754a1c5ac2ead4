"""One engine on several ranks: each runs the same engine on the same requests, step by step, and the first one leads.

The leader is an `Engine` to whoever uses it. It says what it does before or while it does it, and the others, who follow, do the same:
pages, batches and numbers are then the same everywhere, for nothing but the requests decides about them. Tokens are chosen by the leader
and handed over. A request's seed is fixed before the others hear of it.

A rank that fails within a step leaves the others somewhere in theirs, where nothing can be said to them any more. Then all end: its
process with an error, and the others by torchrun.
"""

import json
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokensieve.engine.core import Engine, EngineConfig, default_pages
from tokensieve.engine.request import Output, Request, Sampling
from tokensieve.engine.sampling import SamplingRow
from tokensieve.mesh import Mesh
from tokensieve.model import DecoderForCausalLM

NEVER = timedelta(days=3650)  # those who follow hear nothing while nobody asks for anything


class Line:
    """What the leader says to all others, in order: JSON, or nothing at all, which means a step and is said most often."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=NEVER)

    def say(self, *words: Any) -> None:
        text = json.dumps(words).encode() if words else b""
        dist.broadcast(torch.tensor([len(text)]), 0, self._group)
        if text:
            dist.broadcast(torch.frombuffer(bytearray(text), dtype=torch.uint8), 0, self._group)

    def hear(self) -> list[Any]:
        try:
            length = torch.zeros(1, dtype=torch.int64)
            dist.broadcast(length, 0, self._group)
            text = torch.empty(int(length), dtype=torch.uint8)
            if len(text):
                dist.broadcast(text, 0, self._group)
        except RuntimeError:  # the leader is gone, and has told why
            sys.exit(1)
        return json.loads(bytes(text.tolist())) if len(text) else []


class OneOfRanks(Engine):
    """All ranks call its methods in the same order, with the same requests, whose seeds are fixed."""

    def __init__(self, model: DecoderForCausalLM, tokenizer: Any, config: EngineConfig, mesh: Mesh):
        self.mesh = mesh
        pages = config.pages or default_pages(model, config.running, mesh.size)
        super().__init__(model, tokenizer, replace(config, pages=mesh.all_reduce_min(pages)))

    def _choose(self, logits_BV: Tensor, rows: list[SamplingRow]) -> list[int]:
        return self.mesh.broadcast(super()._choose(logits_BV, rows) if self.mesh.leads else [0] * len(rows))


class Leader(OneOfRanks):
    """An engine as any other, but that a step which raised is the last one."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.line = Line()
        self._turn = threading.Lock()  # the thread that ends the engine may not be the one that runs it
        self._ended = False

    def add(self, request: Request) -> None:
        if request.sampling.seed is None:
            request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(64)))
        with self._speaking():
            super().add(request)
            self.line.say("add", vars(request) | {"sampling": vars(request.sampling)})

    def abort(self, id: str) -> Output | None:
        with self._speaking():
            self.line.say("abort", id)
            return super().abort(id)

    def fail_all(self, error: str) -> list[Output]:
        if self._ended:
            return super().fail_all(error)
        with self._speaking():
            self.line.say("fail", error)
            return super().fail_all(error)

    def step(self) -> list[Output]:
        with self._speaking():
            self.line.say()
            try:
                return super().step()
            except BaseException:
                self._ended = True
                if threading.current_thread() is not threading.main_thread():
                    signal.raise_signal(signal.SIGTERM)  # to the server, whose callers can have no more answers
                raise

    def end(self) -> None:
        """The others end too. RuntimeError where a step that raised has left them to torchrun."""
        if self._ended:
            raise RuntimeError("a step of the engine failed, and with it ends what runs on all ranks")
        with self._speaking():
            self._ended = True
            self.line.say("end")

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        with self._turn, _signals_wait():
            if self._ended:
                raise RuntimeError("the engine of these ranks has ended")
            yield


class Follower(OneOfRanks):
    def follow(self) -> None:
        """Does what the leader does, until it ends. Signals are for the leader alone: it may have answers to finish."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        line = Line()
        while True:
            match line.hear():
                case []:
                    self.step()
                case ["add", fields]:
                    self.add(request_of(fields))
                case ["abort", id]:
                    self.abort(id)
                case ["fail", error]:
                    self.fail_all(error)
                case ["end"]:
                    return


def request_of(fields: dict[str, Any]) -> Request:
    """A request from its fields as JSON has them."""
    sampling = fields["sampling"]
    tuples = {"stop": tuple(sampling["stop"]), "logit_bias": tuple((t, b) for t, b in sampling["logit_bias"])}
    return Request(**fields | {"prompt": tuple(fields["prompt"]), "sampling": Sampling(**sampling | tuples)})


@contextmanager
def engine_on(
    mesh: Mesh, model: DecoderForCausalLM, tokenizer: Any, config: EngineConfig | None = None
) -> Iterator[Engine | None]:
    """An engine on all ranks, for the leader's block to use; SIGTERM ends that in order, with status 0. For one rank an engine as any.

    The others do what the leader's does; their blocks get None, once the leader's has ended.
    """
    config = config or EngineConfig()
    if mesh.size == 1:
        yield Engine(model, tokenizer, config)
    elif mesh.leads:
        leader = Leader(model, tokenizer, config, mesh)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
        try:
            yield leader
        finally:
            leader.end()
    else:
        Follower(model, tokenizer, config, mesh).follow()
        yield None


@contextmanager
def _signals_wait() -> Iterator[None]:
    """A signal that ended a step halfway would leave the other ranks halfway in theirs."""
    if threading.current_thread() is not threading.main_thread():  # the handlers run in the main thread
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for waiting in came:
            signal.raise_signal(waiting)
