"""One engine on several ranks: each runs the same engine on the same requests, step by step, and rank 0 leads.

The leader is used like any `Engine`. It broadcasts every call before or while it carries it out, and the other ranks,
the followers, do the same. Pages, batches and numbers are functions of the requests alone, so they stay identical on
all ranks. The leader chooses the tokens and broadcasts them. It fixes a request's seed before the followers receive
the request.

If a rank fails within a step, the others are left somewhere in theirs, where no message reaches them any more. Then all
end: the process of the failed rank with an error, and the others by torchrun.
"""

import json
import logging
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

from tokensieve.engine.config import EngineConfig, default_pages
from tokensieve.engine.core import Engine
from tokensieve.engine.request import Output, Request, Sampling
from tokensieve.engine.sampling import SamplingRow
from tokensieve.mesh import Mesh
from tokensieve.model import DecoderForCausalLM

log = logging.getLogger("tokensieve.engine")

NEVER = timedelta(days=3650)  # followers receive nothing while there are no requests


class Channel:
    """Messages from the leader to all followers, in order.

    A message is JSON. The empty message means a step, because it is the most frequent one.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=NEVER, group_desc="engine")  # the ranks, with this timeout

    def send(self, *message: Any) -> None:
        """Sends a message from the leader."""
        text = json.dumps(message).encode() if message else b""
        dist.broadcast(torch.tensor([len(text)]), 0, self._group)
        if text:
            dist.broadcast(torch.frombuffer(bytearray(text), dtype=torch.uint8), 0, self._group)

    def receive(self) -> list[Any]:
        """Next message, on a follower. Ends the process with status 1 if the leader is gone."""
        try:
            length = torch.zeros(1, dtype=torch.int64)
            dist.broadcast(length, 0, self._group)
            text = torch.empty(int(length), dtype=torch.uint8)
            if len(text):
                dist.broadcast(text, 0, self._group)
        except RuntimeError:  # the leader is gone, and has reported why
            sys.exit(1)
        return json.loads(bytes(text.tolist())) if len(text) else []


class OneOfRanks(Engine):
    """The engine of one rank. All ranks call its methods in the same order, with the same requests and fixed seeds."""

    def __init__(self, model: DecoderForCausalLM, tokenizer: Any, config: EngineConfig, mesh: Mesh):
        self.mesh = mesh
        pages = config.pages or default_pages(model, config.running, mesh.size)
        super().__init__(model, tokenizer, replace(config, pages=mesh.all_reduce_min(pages)))

    def _choose(self, logits_BV: Tensor, rows: list[SamplingRow]) -> list[int]:
        return self.mesh.broadcast(super()._choose(logits_BV, rows) if self.mesh.leads else [0] * len(rows))


class Leader(OneOfRanks):
    """The engine of rank 0. Its interface is that of any engine, but a step that raises is the last one."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.channel = Channel()
        self._lock = threading.Lock()  # the thread that ends the engine may not be the one that runs it
        self._ended = False

    def add(self, request: Request) -> None:
        if request.sampling.seed is None:
            request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(64)))
        with self._sending():
            super().add(request)  # first: a request that is refused here is not sent
            self.channel.send("add", vars(request) | {"sampling": vars(request.sampling)})

    def abort(self, id: str) -> Output | None:
        with self._sending():
            self.channel.send("abort", id)
            return super().abort(id)

    def fail_all(self, error: str) -> list[Output]:
        if self._ended:
            return super().fail_all(error)
        with self._sending():
            self.channel.send("fail", error)
            return super().fail_all(error)

    def step(self) -> list[Output]:
        with self._sending():
            self.channel.send()
            try:
                return super().step()
            except BaseException:
                self._ended = True
                if threading.current_thread() is not threading.main_thread():
                    signal.raise_signal(signal.SIGTERM)  # ends the server, which can answer nothing more
                raise

    def end(self) -> None:
        """Ends the followers and this engine.

        Raises RuntimeError if a step has raised: then torchrun ends the followers.
        """
        if self._ended:
            raise RuntimeError("a step of the engine failed, so the engines of all ranks end")
        with self._sending():
            self._ended = True
            self.channel.send("end")

    @contextmanager
    def _sending(self) -> Iterator[None]:
        """Block in which the leader sends a message and carries it out, without being interrupted."""
        with self._lock, _deferred_signals():
            if self._ended:
                raise RuntimeError("the engine of these ranks has ended")
            yield


class Follower(OneOfRanks):
    """The engine of every other rank."""

    def follow(self) -> None:
        """Does what the leader does, until the leader ends.

        Signals are ignored here. The leader alone handles them, since it may have answers to finish.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        channel = Channel()
        while True:
            match channel.receive():
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
    """Request from its fields as decoded from JSON."""
    sampling = fields["sampling"]
    tuples = {"stop": tuple(sampling["stop"]), "logit_bias": tuple((t, b) for t, b in sampling["logit_bias"])}
    return Request(**fields | {"prompt": tuple(fields["prompt"]), "sampling": Sampling(**sampling | tuples)})


@contextmanager
def engine_on(
    mesh: Mesh, model: DecoderForCausalLM, tokenizer: Any, config: EngineConfig | None = None
) -> Iterator[Engine | None]:
    """An engine on all ranks, as a context manager.

    The leader's block gets the engine. SIGTERM ends that block in order, with status 0. The followers do what the
    leader does; their blocks get None, once the leader's block has ended. On a single rank the block gets an ordinary
    engine, and signals are handled as before. The size of the cache is logged.
    """
    config = config or EngineConfig()
    if mesh.size == 1:
        engine = Engine(model, tokenizer, config)
        log.info("cache: %s", engine.cache_size)
        yield engine
    elif mesh.leads:
        leader = Leader(model, tokenizer, config, mesh)
        log.info("cache: %s", leader.cache_size)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
        try:
            yield leader
        finally:
            leader.end()
    else:
        Follower(model, tokenizer, config, mesh).follow()
        yield None


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """Block whose signals take effect at its end.

    A signal that ended a step halfway would leave the other ranks halfway in theirs.
    """
    if threading.current_thread() is not threading.main_thread():  # the handlers run in the main thread
        yield
        return
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for deferred in received:
            signal.raise_signal(deferred)
