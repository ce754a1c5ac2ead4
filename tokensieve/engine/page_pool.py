"""Which pages of the cache belong to whom: counted, shared between requests that begin alike, and never lost.

A page holds 64 tokens. A full one is known by the digest of all tokens up to its end, so that a later prompt that begins alike finds it;
what nobody uses any more stays known until its room is needed, the longest unused first.
"""

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence

from tokensieve.ops.quant import PAGE_TOKENS

Digest = bytes


def digests(tokens: Sequence[int], kind: str) -> Iterator[Digest]:
    """Of each full page of `tokens`. kind: what else the entries depend on."""
    before, numbers = kind.encode(), array("I", tokens)
    for a in range(0, len(tokens) - PAGE_TOKENS + 1, PAGE_TOKENS):
        before = hashlib.blake2b(before + numbers[a : a + PAGE_TOKENS].tobytes(), digest_size=16).digest()
        yield before


class PagePool:
    def __init__(self, pages: int):
        self.pages = pages
        self._free = deque(range(pages))
        self._users = [0] * pages
        self._known: dict[Digest, int] = {}
        self._digest: dict[int, Digest] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # known pages without a user, the longest unused first

    @property
    def available(self) -> int:
        """Pages that `take` could give."""
        return len(self._free) + len(self._unused)

    @property
    def used(self) -> int:
        return self.pages - self.available

    def take(self, count: int) -> list[int] | None:
        """`count` pages with one user each, or None where there are not so many."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.popleft()
            else:
                page, _ = self._unused.popitem(last=False)
                del self._known[self._digest.pop(page)]
            self._users[page] = 1
            taken.append(page)
        return taken

    def find(self, wanted: Sequence[Digest]) -> list[int]:
        """The pages of as many of the digests, from the first on, as are known."""
        found = []
        for digest in wanted:
            if digest not in self._known:
                break
            found.append(self._known[digest])
        return found

    def share(self, pages: Sequence[int]) -> None:
        """One more user of each."""
        for page in pages:
            self._unused.pop(page, None)
            self._users[page] += 1

    def publish(self, page: int, digest: Digest) -> None:
        """This page is full and will not change: others may share it. Of two with the same content the first stays known."""
        if digest not in self._known and page not in self._digest:
            self._known[digest], self._digest[page] = page, digest

    def forget(self) -> None:
        """After a fault: nothing that was written so far is shared with anybody new."""
        self._free.extend(self._unused)
        for kept in (self._unused, self._known, self._digest):
            kept.clear()

    def release(self, pages: Sequence[int]) -> None:
        """One user less of each. The last pages of a sequence are forgotten first: without the ones before they are of no use."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._digest:
                    self._unused[page] = None
                else:
                    self._free.append(page)
            elif self._users[page] < 0:
                raise RuntimeError(f"page {page} was released more often than it was taken")
