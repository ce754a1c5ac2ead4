"""Who runs next: prompts in chunks, answers in batches, pages for as long as they last.

A request waits until there are pages for its whole prompt and one token more; from then on it holds them. Every step runs a few chunks of
prompts and one token of every answer. When pages run out, the youngest answer gives its own back and begins again later:
its prompt is run anew, and its tokens, which it keeps, are fed to it one by one as they were, so that nothing of it changes.
"""

from collections import deque
from dataclasses import dataclass, field
from functools import cached_property

from tokensieve.engine.page_pool import Digest, PagePool, digests
from tokensieve.engine.request import Request
from tokensieve.ops.quant import PAGE_TOKENS

AHEAD = 32  # of those that wait, so many are looked at in a step, however many there are
MOST_PASSES = 16  # requests that may be let in before one that came earlier and needs more pages


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


@dataclass(eq=False)
class Running:
    """A request on its way. tokens: prompt and answer; cached: so many of them have entries in `pages`."""

    request: Request
    seed: int
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    found: int = 0  # of the prompt, in pages that were there already
    arrival: int = 0
    passed: int = 0  # how many that came later were let in before it

    @cached_property
    def digests(self) -> list[Digest]:
        """Of the prompt's full pages. Asked for at every step while there is no room, so made once."""
        return list(digests(self.request.prompt, self.request.selector))

    @property
    def prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def answered(self) -> int:
        return len(self.tokens) - self.prompt

    @property
    def in_prompt(self) -> bool:
        return self.cached < self.prompt


class Scheduler:
    def __init__(self, pages: int, most_running: int, chunk: int, chunks: int, share_prefixes: bool = True):
        """chunk: tokens of a prompt that are run at once, a multiple of 64; chunks: so many of them in a step."""
        self.pool = PagePool(pages)
        self.most_running, self.chunk, self.chunks, self.share = most_running, chunk, chunks, share_prefixes
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []  # by arrival
        self._arrivals = 0
        self.preempted = 0  # how often a request had to give its pages back

    def add(self, request: Request, seed: int) -> Running:
        running = Running(request, seed, list(request.prompt), arrival=self._arrivals)
        self._arrivals += 1
        self.waiting.append(running)
        return running

    def admit(self) -> None:
        """Lets in whom there is room for, in the order of arrival. Smaller ones may pass one that has to wait, but not for ever."""
        left_out: list[Running] = []
        in_work = {r.digests[-1] for r in self.running if self._makes(r)}
        looked_at = 0
        for running in list(self.waiting):
            if self._shareable(running) and running.digests[-1] in in_work:
                continue  # soon the same prompt's pages are there for it: it delays nobody behind it
            looked_at += 1
            full = looked_at > AHEAD or len(self.running) >= self.most_running
            if full or any(r.passed >= MOST_PASSES for r in left_out):
                return
            if self._enter(running):
                for other in left_out:
                    other.passed += 1
                in_work |= {running.digests[-1]} if self._makes(running) else set()
            else:
                left_out.append(running)

    def _shareable(self, running: Running) -> int:
        """Tokens of a prompt that others may find or that it may find itself: whole chunks, and never all of it, whose last logits are
        wanted."""
        return (running.prompt - 1) // self.chunk * self.chunk if self.share else 0

    def _makes(self, running: Running) -> bool:
        """Whether chunks that others may find are still to be run."""
        return running.cached < self._shareable(running)

    def _enter(self, running: Running) -> bool:
        known = self._known(running)
        self.pool.share(known)
        taken = self.pool.take(pages_for(len(running.tokens) + 1) - len(known))
        if taken is None:
            self.pool.release(known)
            return False
        self.waiting.remove(running)
        running.pages, running.cached = known + taken, len(known) * PAGE_TOKENS
        if running.answered == 0:
            running.found = max(running.found, running.cached)
        self.running.append(running)
        self.running.sort(key=lambda r: r.arrival)
        return True

    def _known(self, running: Running) -> list[int]:
        """Pages that hold the beginning of the prompt, whole chunks of it."""
        if not self._shareable(running):
            return []
        found = self.pool.find(running.digests)
        whole = min(len(found) * PAGE_TOKENS // self.chunk * self.chunk, self._shareable(running))
        return found[: whole // PAGE_TOKENS]

    def next_chunks(self) -> list[Running]:
        """Whose prompts are run on in this step: the one that is done soonest, then the oldest, and so on by turns.

        So a short prompt does not wait for a long one, and a long one is not passed forever.
        """
        left = [r for r in self.running if r.in_prompt]
        chosen: list[Running] = []
        while left and len(chosen) < self.chunks:
            soonest = len(chosen) % 2 == 0
            best = min(left, key=lambda r: (r.prompt - r.cached, r.arrival)) if soonest else left[0]
            left.remove(best)
            chosen.append(best)
        return chosen

    def chunk_of(self, running: Running) -> int:
        """The end of the running prompt's next chunk, counted from the prompt's beginning."""
        return min((running.cached // self.chunk + 1) * self.chunk, running.prompt)

    def ran(self, running: Running, cached: int) -> None:
        """Entries of `cached` tokens are there now: pages of the prompt may be shared."""
        if self.share and running.in_prompt:
            # whole chunks only: what a shorter chunk stores has other bits
            new = slice(running.cached // PAGE_TOKENS, cached // self.chunk * self.chunk // PAGE_TOKENS)
            for page, digest in zip(running.pages[new], running.digests[new], strict=True):
                self.pool.publish(page, digest)
        running.cached = cached

    def prepare_step(self) -> list[Running]:
        """Those that run one token each, all with a page for it. Where pages are too few, the youngest give theirs back, and wait."""
        ready = [r for r in self.running if not r.in_prompt]
        for running in ready:
            while running in self.running and len(running.pages) < pages_for(running.cached + 1):
                page = self.pool.take(1)
                if page is not None:
                    running.pages += page
                else:
                    self._preempt(self.running[-1])
        return [r for r in ready if r in self.running]

    def _preempt(self, running: Running) -> None:
        self.remove(running)
        running.cached, running.pages = 0, []
        self.waiting.appendleft(running)
        self.preempted += 1

    def remove(self, running: Running) -> None:
        """Its pages come back, wherever it was."""
        if running in self.running:
            self.running.remove(running)
        elif running in self.waiting:
            self.waiting.remove(running)
        self.pool.release(running.pages)
        running.pages = []
