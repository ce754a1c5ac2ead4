"""What runs next: prompts in chunks, answers in batches, for as long as there are pages.

A request waits until there are pages for its whole prompt and one more token. From then on it holds them. Every step
runs a few chunks of prompts and one token of every answer.

Requests with the same prompt wait while the first of them runs it, and then begin where it ends: they share its full
pages and have a copy of the last one. So do later ones, as long as one of them runs.

If pages run out, the youngest request is preempted: its pages are released, and it begins again later. Its prompt is
then run anew. Its tokens are kept and fed back one by one, exactly as before, so that nothing in the answer changes.
"""

from collections import deque
from dataclasses import dataclass, field
from functools import cached_property

from tokensieve.engine.page_pool import Digest, PagePool, digest_of, digests
from tokensieve.engine.request import Request
from tokensieve.ops.quant import PAGE_TOKENS

AHEAD = 32  # waiting requests that are considered in a step, however many there are
MOST_PASSES = 16  # later requests that may be admitted before one that needs more pages


def pages_for(tokens: int) -> int:
    """Number of pages that hold so many tokens."""
    return -(-tokens // PAGE_TOKENS)


@dataclass(eq=False)
class Running:
    """A request from its arrival to its end, whether it waits or runs.

    request: the request itself.
    seed: seed of its draws.
    tokens: prompt, then answer.
    pages: pages of the cache that it holds, in order.
    cached: number of its tokens that have entries in `pages`.
    reused: number of its prompt's tokens that were found in the cache.
    arrival: its number in the order of arrival.
    passed: number of later requests that were admitted before it.
    """

    request: Request
    seed: int
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    reused: int = 0
    arrival: int = 0
    passed: int = 0

    @cached_property
    def digests(self) -> list[Digest]:
        """Digests of the prompt's full pages. Cached, since they are needed at every step while the request waits."""
        return list(digests(self.request.prompt, self.request.selector))

    @cached_property
    def whole(self) -> Digest:
        """Digest of the whole prompt. No page has it."""
        return digest_of(self.request.prompt, f"whole {self.request.selector}")

    @cached_property
    def prompt(self) -> int:
        """Tokens of the prompt. Cached, since every step asks every request."""
        return len(self.request.prompt)

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt

    @property
    def in_prompt(self) -> bool:
        """Whether a part of the prompt is still to be run."""
        return self.cached < self.prompt


class Scheduler:
    def __init__(self, pages: int, max_running: int, chunk: int, chunks: int, share_prefixes: bool = True):
        """Scheduler without requests.

        pages: pages of the cache.
        max_running: requests that run at once.
        chunk: tokens of a prompt that are run at once, a multiple of 64.
        chunks: chunks that are run in a step.
        share_prefixes: whether prompts that begin alike share pages.
        """
        self.pool = PagePool(pages)
        self.max_running, self.chunk, self.chunks, self.share = max_running, chunk, chunks, share_prefixes
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []  # by arrival
        self._arrivals = 0
        self.preempted = 0  # number of preemptions so far

    def add(self, request: Request, seed: int) -> Running:
        running = Running(request, seed, list(request.prompt), arrival=self._arrivals)
        self._arrivals += 1
        self.waiting.append(running)
        return running

    def admit(self) -> list[tuple[Running, Running]]:
        """Admits the requests for which there is room, in order of arrival.

        Smaller requests may pass one that has to wait, but only `MOST_PASSES` times. Returns those that begin at the
        end of their prompt, each with another one that has run it. They share its full pages. If the prompt ends within
        a page, its entries have to be copied to their last one.
        """
        if not self.waiting:
            return []
        begun: list[tuple[Running, Running]] = []
        shared = self.running if self.share else []
        read = {r.whole: r for r in shared if not (r.in_prompt or r.request.trace)}  # a trace may round otherwise
        skipped: list[Running] = []
        in_progress = {digest for r in self.running for digest in self._in_progress(r)}
        considered = 0
        for running in list(self.waiting):
            if self._waits(running, in_progress):
                continue
            leader = read.get(running.whole) if self._forks(running) else None
            considered += leader is None
            full = considered > AHEAD or len(self.running) >= self.max_running
            if full or any(r.passed >= MOST_PASSES for r in skipped):
                break
            if self._start(running, leader):
                for other in skipped:
                    other.passed += 1
                in_progress |= self._in_progress(running)
                begun += [] if leader is None else [(running, leader)]
            else:
                skipped.append(running)
        return begun

    def _forks(self, running: Running) -> bool:
        """Whether a request may begin at the end of another one's prompt: it needs no pass of its own over it."""
        request = running.request
        return self.share and request.sampling.prompt_logprobs is None and not request.trace and running.answered == 0

    def _in_progress(self, running: Running) -> set[Digest]:
        """Digests of what others can soon share of a running request's prompt: full pages, and the whole prompt."""
        pages = {running.digests[-1]} if running.cached < self._shareable(running) else set()
        return pages | ({running.whole} if running.in_prompt and self._forks(running) else set())

    def _waits(self, running: Running, in_progress: set[Digest]) -> bool:
        """Whether a request waits for a prompt that is being run, which it can soon share.

        That counts as no delay: it neither uses up the look-ahead nor holds up the ones behind it.
        """
        if self._forks(running) and running.whole in in_progress:
            return True
        return self._shareable(running) > 0 and running.digests[-1] in in_progress

    def _shareable(self, running: Running) -> int:
        """Length of the prompt's prefix that can be shared: whole chunks, and never the last token.

        The last token is always run, because its logits are needed, and all tokens if log probabilities of the prompt
        were requested.
        """
        shares = self.share and running.request.sampling.prompt_logprobs is None
        return (running.prompt - 1) // self.chunk * self.chunk if shares else 0

    def _start(self, running: Running, leader: Running | None = None) -> bool:
        """Moves a waiting request to the running ones, to the end of its prompt if another one has run it.

        False if there are too few pages for it.
        """
        shared = self._cached_prefix(running) if leader is None else leader.pages[: leader.prompt // PAGE_TOKENS]
        # Shared before any page is taken, since taking pages may evict unused ones.
        self.pool.share(shared)
        new = self.pool.take(pages_for(len(running.tokens) + 1) - len(shared))
        if new is None:
            self.pool.release(shared)
            return False
        self.waiting.remove(running)
        running.pages = shared + new
        running.cached = len(shared) * PAGE_TOKENS if leader is None else leader.prompt
        if running.answered == 0:
            running.reused = max(running.reused, running.cached)
        self.running.append(running)
        self.running.sort(key=lambda r: r.arrival)
        return True

    def _cached_prefix(self, running: Running) -> list[int]:
        """Pages in the cache that hold the beginning of the prompt, in whole chunks."""
        if not self._shareable(running):
            return []
        pages = self.pool.find(running.digests)
        tokens = min(len(pages) * PAGE_TOKENS // self.chunk * self.chunk, self._shareable(running))
        return pages[: tokens // PAGE_TOKENS]

    def next_chunks(self) -> list[Running]:
        """Requests whose prompts run one chunk each in this step: the one nearest its end, then the oldest, by turns.

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

    def chunk_end(self, running: Running) -> int:
        """End of the prompt's next chunk, in tokens from the beginning of the prompt."""
        return min((running.cached // self.chunk + 1) * self.chunk, running.prompt)

    def ran(self, running: Running, cached: int) -> None:
        """Records that entries of `cached` tokens are there now, so that pages of the prompt can be shared."""
        if self.share and running.in_prompt:
            # Whole chunks only: a shorter chunk stores other bits.
            new = slice(running.cached // PAGE_TOKENS, cached // self.chunk * self.chunk // PAGE_TOKENS)
            for page, digest in zip(running.pages[new], running.digests[new], strict=True):
                self.pool.publish(page, digest)
        running.cached = cached

    def prepare_step(self) -> list[Running]:
        """Requests that run one token each in this step, all with a page for it.

        If there are too few pages, the youngest requests are preempted: their pages are released, and they wait again.
        """
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
        """Takes a request out, whether it runs or waits, and releases its pages."""
        if running in self.running:
            self.running.remove(running)
        elif running in self.waiting:
            self.waiting.remove(running)
        self.pool.release(running.pages)
        running.pages = []
