"""Many asyncio callers on one engine: a thread of its own steps the engine and hands every caller what is its own.

The engine is touched by that thread only. Callers leave requests and abortions in an inbox; outputs go to a queue per caller, so that a
slow reader delays nobody: what a queue can hold is bounded by the requests' `max_tokens`.
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


WAITING = 4096  # a prompt of 32768 tokens that waits takes 1.5 MB


class Busy(Exception):
    """As many requests as may wait are waiting; one may be asked again later."""


class Stopping(Exception):
    """The service takes no requests: it has not begun, finishes its last ones, or has ended."""


@dataclass(eq=False)
class Caller:
    """Whoever reads a request's outputs. An exception in the queue is raised to the reader."""

    request: Request
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Output | UserError] = field(default_factory=asyncio.Queue)  # of all requests asked together


@dataclass(frozen=True)
class EngineLoad:
    """What the engine holds at this moment. preempted: how often, since the beginning, an answer gave its pages back."""

    running: int
    waiting: int
    pages: int
    pages_used: int
    preempted: int


class Service:
    """waiting: requests that may wait while as many run as the engine lets run."""

    def __init__(self, engine: Engine, waiting: int = WAITING):
        if waiting < 0:
            raise UserError(f"waiting is {waiting}; it must be 0 or more")
        self.engine = engine
        self._most = engine.config.running + waiting
        self._inbox: deque[Caller | str] = deque()  # a new caller, or the id of a request to abort
        self._callers: dict[str, Caller] = {}
        self._adding: Caller | None = None  # while the engine takes it in
        self._open: set[str] = set()  # ids that were taken in and have not ended
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ending = False
        self.draining = False  # plain, so that a signal handler may set it: no request is taken in from then on

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def open(self) -> int:
        """Requests that were taken in and have not ended."""
        return len(self._open)

    @property
    def load(self) -> EngineLoad:
        scheduler = self.engine.scheduler
        running, pool = len(scheduler.running), scheduler.pool
        return EngineLoad(running, max(0, self.open - running), pool.pages, pool.used, scheduler.preempted)

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()

    def stop(self, drain: bool = True) -> None:
        """Takes no more requests and ends the thread: once the last request has ended, or after aborting all of them."""
        self.draining = True
        with self._changed:
            if not drain:
                self._inbox.extend(self._open)
            self._ending = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    async def stream(self, *requests: Request) -> AsyncGenerator[Output, None]:
        """What comes of requests, up to the outputs that have a `finish`. Leaving early, or being cancelled, aborts those that have none.

        Raises:
            Busy: too many wait already. None of the requests is taken in.
            Stopping: nothing is taken in.
            UserError: a request can never run.
        """
        queue: asyncio.Queue[Output | UserError] = asyncio.Queue()
        self._submit([Caller(request, asyncio.get_running_loop(), queue) for request in requests])
        left = {request.id for request in requests}
        try:
            while left:
                output = await queue.get()
                if isinstance(output, UserError):
                    raise output
                if output.finish is not None:
                    left.discard(output.id)
                yield output
        finally:
            if left:
                self._leave(left)

    def _submit(self, callers: list[Caller]) -> None:
        ids = [caller.request.id for caller in callers]
        with self._changed:
            if self.draining or not self.alive:
                raise Stopping("the server is stopping" if self.draining else "the engine does not run")
            for id in ids:
                if id in self._open or ids.count(id) > 1:
                    raise UserError(f"there is a request {id} already; give each its own id")
            if len(ids) > self._most:
                raise UserError(
                    f"{len(ids)} answers are asked for at once, and {self._most} may run and wait; ask for less"
                )
            if len(self._open) + len(ids) > self._most:
                raise Busy(f"{len(self._open)} requests run or wait already, of {self._most} that may; try again later")
            self._open.update(ids)
            self._inbox.extend(callers)
            self._changed.notify()

    def _leave(self, ids: Iterable[str]) -> None:
        with self._changed:
            self._inbox.extend(ids)
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._wait():
                try:
                    self._turn()
                except Exception as error:
                    # The one place that catches everything: a defect met by one request must not end all later ones.
                    log.exception("the engine failed; what it was at ends with an error")
                    self._fail(f"the engine failed: {type(error).__name__}")
        finally:  # by a defect, or in order: nobody is left waiting
            self.draining = True
            with self._changed:
                unread = [c for c in (*self._callers.values(), *self._inbox) if isinstance(c, Caller)]
                self._inbox.clear()
            self._deliver([(c, Output(c.request.id, "", (), finish="error", error="the engine ended")) for c in unread])

    def _wait(self) -> bool:
        """Sleeps while there is nothing to do; False when there will be nothing any more."""
        with self._changed:
            while not (self._inbox or self.engine.busy or self._ending):
                self._changed.wait()
            return bool(self._inbox or self.engine.busy)

    def _turn(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, str):
                ended = self.engine.abort(item)
                self._hand_out([] if ended is None else [ended])
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
        """The request that was being added, which the others have no part in; or else all of them."""
        if self._adding is not None:
            id, self._adding = self._adding.request.id, None
            self.engine.abort(id)
            self._hand_out([Output(id, "", (), finish="error", error=error)])
        else:
            self._hand_out(self.engine.fail_all(error))
            # those too that had ended in the step that failed, of which nobody has heard
            left = list(self._callers.values())
            self._deliver([(c, Output(c.request.id, "", (), finish="error", error=error)) for c in left])

    def _hand_out(self, outputs: list[Output]) -> None:
        self._deliver([(self._callers[o.id], o) for o in outputs if o.id in self._callers])

    def _deliver(self, said: list[tuple[Caller, Output | UserError]]) -> None:
        by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[Caller, Any]]] = defaultdict(list)
        for caller, output in said:
            by_loop[caller.loop].append((caller, output))
            if isinstance(output, UserError) or output.finish is not None:
                self._callers.pop(caller.request.id, None)
                self._open.discard(caller.request.id)
        for loop, its in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put, its)
            except RuntimeError:  # the loop is closed, and its callers gone with it
                self._inbox.extend(caller.request.id for caller, _ in its)


def _put(said: list[tuple[Caller, Output | UserError]]) -> None:
    for caller, output in said:
        caller.queue.put_nowait(output)
