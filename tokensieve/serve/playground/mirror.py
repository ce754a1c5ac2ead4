"""A share of the answers, repeated with the other kind of attention. The log shows what selection changes."""

import asyncio
import random
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from tokensieve.config import UserError
from tokensieve.engine import Busy, Request, Service, Stopping
from tokensieve.serve.engine_requests import attention_of, with_other_attention
from tokensieve.serve.record import log_event


def difference(a: Sequence[int], b: Sequence[int]) -> dict[str, Any]:
    """Two answers compared.

    first_difference: the first position at which they differ, None if they are equal. agreement: the share of the
    longer one's positions at which both have the same token.
    """
    equal = [x == y for x, y in zip(a, b)]
    longest = max(len(a), len(b))
    first = next((i for i, same in enumerate(equal) if not same), len(equal) if len(a) != len(b) else None)
    return {"first_difference": first, "agreement": round(sum(equal) / longest, 4) if longest else 1.0}


class Mirror:
    """Repeats answers once the clients have theirs, and gives way if requests wait or the service stops.

    share: of the answers, between 0 and 1. selector: who selects keys when a dense answer is repeated.
    """

    def __init__(self, service: Service, share: float, selector: str = "indexer"):
        self._service, self._share, self._selector = service, share, selector
        self._tasks: set[asyncio.Task[None]] = set()

    def consider(self, request: Request, tokens: Sequence[int]) -> None:
        """Repeat the request, or not, by chance. tokens: of its answer."""
        if not self._service.draining and random.random() < self._share:
            task = asyncio.create_task(self._repeat(request, tokens))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _repeat(self, request: Request, tokens: Sequence[int]) -> None:
        if self._service.load.waiting:
            log_event("mirror", id=request.id, skipped="requests wait")
            return
        other = with_other_attention(request, f"{request.id}-mirror", self._selector)
        other_tokens: list[int] = []
        finish: str | None = None
        try:
            async with aclosing(self._service.stream(other)) as stream:
                async for output in stream:
                    other_tokens += output.tokens
                    finish = output.finish
                    if self._service.draining:
                        return
        except (Busy, Stopping, UserError) as error:
            log_event("mirror", id=request.id, skipped=str(error))
            return
        counts = [len(tokens), len(other_tokens)]
        fields = {"id": request.id, "selection": attention_of(request), "tokens": counts, "finish": finish}
        log_event("mirror", **fields, **difference(tokens, other_tokens))
