"""A share of the answers given once more with the other kind of attention, to see in the log what selection changes."""

import asyncio
import random
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from tokensieve.config import UserError
from tokensieve.engine import Busy, Request, Service, Stopping
from tokensieve.serve.gate import log_event


def difference(a: Sequence[int], b: Sequence[int]) -> dict[str, Any]:
    """first_difference: the first position at which two answers differ, None where there is none; agreement: the share of the positions of
    the longer one at which both have the same token."""
    equal = [x == y for x, y in zip(a, b)]
    longest = max(len(a), len(b))
    first = next((i for i, same in enumerate(equal) if not same), len(equal) if len(a) != len(b) else None)
    return {"first_difference": first, "agreement": round(sum(equal) / longest, 4) if longest else 1.0}


class Mirror:
    """It begins when the client has its answer, and leaves the service to the clients when that is busy or stops."""

    def __init__(self, service: Service, share: float):
        self._service, self._share = service, share
        self._tasks: set[asyncio.Task[None]] = set()

    def consider(self, asked: Request, tokens: Sequence[int]) -> None:
        if not self._service.draining and random.random() < self._share:
            task = asyncio.create_task(self._repeat(asked, tokens))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _repeat(self, asked: Request, tokens: Sequence[int]) -> None:
        other = replace(asked, id=f"{asked.id}-mirror", selector="indexer" if asked.selector == "dense" else "dense")
        again: list[int] = []
        finish: str | None = None
        if self._service.load.waiting:
            log_event("mirror", id=asked.id, skipped="requests wait")
            return
        try:
            async with aclosing(self._service.stream(other)) as stream:
                async for output in stream:
                    again += output.tokens
                    finish = output.finish
                    if self._service.draining:
                        return
        except (Busy, Stopping, UserError) as error:
            log_event("mirror", id=asked.id, skipped=str(error))
            return
        told = {"id": asked.id, "selection": asked.selector, "tokens": [len(tokens), len(again)], "finish": finish}
        log_event("mirror", **told, **difference(tokens, again))
