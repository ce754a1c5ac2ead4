"""Many asyncio callers on one engine, which a thread of its own steps.

Only that thread touches the engine. Callers put requests and ids to abort into an inbox. Outputs go to a queue per
caller, so that a slow reader delays nobody. The size of a queue is bounded by the `max_tokens` of its requests, and by
the chunks of their prompts if they want to know the progress.
"""

import asyncio
import logging
import threading
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from typing import Any

from tokensieve.config import UserError
from tokensieve.engine.core import Engine
from tokensieve.engine.request import Output, Request

log = logging.getLogger("tokensieve.engine")

WAITING = 4096  # requests; a waiting prompt of 32768 tokens takes 1.5 MB


class Busy(Exception):
    """The queue of waiting requests is full. The request may be sent again later."""


class Stopping(Exception):
    """The service takes no requests: it has not started, is finishing its last ones, or has ended."""


@dataclass(eq=False)
class Caller:
    """Reader of the outputs of a request.

    request: the request.
    loop: event loop of the reader.
    queue: outputs of all requests that were submitted together. A UserError in it is raised to the reader.
    """

    request: Request
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Output | UserError] = field(default_factory=asyncio.Queue)


@dataclass(frozen=True)
class EngineLoad:
    """Load of the engine at one moment.

    running: requests that run.
    waiting: requests that wait.
    pages: pages of the cache.
    pages_used: pages that requests hold.
    preempted: number of preemptions since the start. A preempted request's pages are released, and it waits again.
    """

    running: int
    waiting: int
    pages: int
    pages_used: int
    preempted: int


class Service:
    """An engine that many callers share.

    waiting: requests that may wait, besides the `EngineConfig.running` that may run.
    """

    def __init__(self, engine: Engine, waiting: int = WAITING):
        if waiting < 0:
            raise UserError(f"waiting is {waiting}; it must be 0 or more")
        self.engine = engine
        self._limit = engine.config.running + waiting
        self._inbox: deque[Caller | str] = deque()  # a new caller, or the id of a request to abort
        self._callers: dict[str, Caller] = {}
        self._adding: Caller | None = None  # the caller whose request is being added to the engine
        self._open: set[str] = set()  # ids of requests that were accepted and have not ended
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ending = False
        # While this is set no request is accepted. It is a plain attribute, so that a signal handler may set it.
        self.draining = False

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def open(self) -> int:
        """Number of requests that were accepted and have not ended."""
        return len(self._open)

    @property
    def load(self) -> EngineLoad:
        """Load of the engine now."""
        scheduler = self.engine.scheduler
        running, pool = len(scheduler.running), scheduler.pool
        return EngineLoad(running, max(0, self.open - running), pool.pages, pool.used, scheduler.preempted)

    def start(self) -> None:
        """Starts the engine's thread, if it was not started before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()

    def stop(self, drain: bool = True) -> None:
        """Accepts no more requests, and returns once the thread has ended.

        drain: whether the requests run to their end. Otherwise all of them are aborted.
        """
        self.draining = True
        with self._changed:
            if not drain:
                self._inbox.extend(self._open)
            self._ending = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    async def stream(self, *requests: Request) -> AsyncGenerator[Output, None]:
        """Outputs of requests, up to the output of each that has a `finish`.

        If the caller leaves early or is cancelled, the requests that have not ended are aborted.

        Raises:
            Busy: too many requests wait already. None of these is accepted.
            Stopping: the service accepts no requests.
            UserError: a request can never run.
        """
        queue: asyncio.Queue[Output | UserError] = asyncio.Queue()
        self._submit([Caller(request, asyncio.get_running_loop(), queue) for request in requests])
        unfinished = {request.id for request in requests}
        try:
            while unfinished:
                output = await queue.get()
                if isinstance(output, UserError):
                    raise output
                if output.finish is not None:
                    unfinished.discard(output.id)
                yield output
        finally:
            if unfinished:
                self._abort(unfinished)

    def _submit(self, callers: list[Caller]) -> None:
        ids = [caller.request.id for caller in callers]
        with self._changed:
            if self.draining or not self.alive:
                raise Stopping("the server is stopping" if self.draining else "the engine does not run")
            for id in ids:
                if id in self._open or ids.count(id) > 1:
                    raise UserError(f"there is a request {id} already; give each its own id")
            if len(ids) > self._limit:
                raise UserError(
                    f"{len(ids)} answers are asked for at once, and {self._limit} may run and wait; ask for fewer"
                )
            if len(self._open) + len(ids) > self._limit:
                raise Busy(
                    f"{len(self._open)} requests run or wait already, of {self._limit} that may; try again later"
                )
            self._open.update(ids)
            self._inbox.extend(callers)
            self._changed.notify()

    def _abort(self, ids: Iterable[str]) -> None:
        with self._changed:
            self._inbox.extend(ids)
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._wait():
                try:
                    self._run_once()
                except Exception as error:
                    # The one place that catches everything: a defect met by one request must not end all later ones.
                    log.exception("the engine failed; the requests that it was working on end with an error")
                    self._fail(f"the engine failed: {type(error).__name__}; the request may be sent again")
        finally:  # however the thread ends, no caller is left waiting
            self.draining = True
            with self._changed:
                unread = [c for c in (*self._callers.values(), *self._inbox) if isinstance(c, Caller)]
                self._inbox.clear()
            self._deliver([(c, Output(c.request.id, "", (), finish="error", error="the engine ended")) for c in unread])

    def _wait(self) -> bool:
        """Sleeps until there is work. False if there will be none any more."""
        with self._changed:
            while not (self._inbox or self.engine.busy or self._ending):
                self._changed.wait()
            return bool(self._inbox or self.engine.busy)

    def _run_once(self) -> None:
        """Empties the inbox, then runs one step."""
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, str):
                output = self.engine.abort(item)
                self._hand_out([] if output is None else [output])
                continue
            self._callers[item.request.id] = self._adding = item
            try:
                self.engine.add(item.request)
            except UserError as error:
                self._deliver([(item, error)])
            self._adding = None
        if self.engine.busy:
            self._hand_out(self.engine.step())

    def _fail(self, error: str) -> None:
        """Ends requests with an error, after a failure.

        If a request was being added, only that one ends, since the others had no part in it. Otherwise all end.
        """
        if self._adding is not None:
            id, self._adding = self._adding.request.id, None
            self.engine.abort(id)
            self._hand_out([Output(id, "", (), finish="error", error=error)])
        else:
            self._hand_out(self.engine.fail_all(error))
            # The requests that had ended within the failed step too: their callers have had no output of it.
            callers = list(self._callers.values())
            self._deliver([(c, Output(c.request.id, "", (), finish="error", error=error)) for c in callers])

    def _hand_out(self, outputs: list[Output]) -> None:
        self._deliver([(self._callers[o.id], o) for o in outputs if o.id in self._callers])

    def _deliver(self, outputs: list[tuple[Caller, Output | UserError]]) -> None:
        """Puts outputs into their callers' queues, with one call per event loop.

        Callers whose requests have ended are dropped.
        """
        by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[Caller, Any]]] = defaultdict(list)
        for caller, output in outputs:
            by_loop[caller.loop].append((caller, output))
            if isinstance(output, UserError) or output.finish is not None:
                self._callers.pop(caller.request.id, None)
                self._open.discard(caller.request.id)
        for loop, loop_outputs in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put, loop_outputs)
            except RuntimeError:  # the loop is closed, and its callers are gone: abort their requests
                self._inbox.extend(caller.request.id for caller, _ in loop_outputs)


def _put(outputs: list[tuple[Caller, Output | UserError]]) -> None:
    for caller, output in outputs:
        caller.queue.put_nowait(output)
