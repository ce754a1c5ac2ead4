"""The pages of the cache: who uses which, shared between requests that begin alike, and never lost.

A page holds 64 tokens. A full page is known by the digest of all tokens up to its end, so that a later prompt that
begins alike finds it. Pages that nobody uses any more stay known until their room is needed. The one that has been
unused for the longest time is evicted first.
"""

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence

from tokensieve.ops.quant import PAGE_TOKENS

Digest = bytes


def digests(tokens: Sequence[int], kind: str) -> Iterator[Digest]:
    """Digest of each full page of `tokens`, together with all tokens before it.

    kind: name of what the entries depend on besides the tokens.
    """
    digest, numbers = kind.encode(), array("I", tokens)
    for a in range(0, len(tokens) - PAGE_TOKENS + 1, PAGE_TOKENS):
        digest = _digest(digest + numbers[a : a + PAGE_TOKENS].tobytes())
        yield digest


def digest_of(tokens: Sequence[int], kind: str) -> Digest:
    """Digest of all tokens together."""
    return _digest(kind.encode() + array("I", tokens).tobytes())


def _digest(content: bytes) -> Digest:
    return hashlib.blake2b(content, digest_size=16).digest()


class PagePool:
    """Pages 0 to `pages` - 1, each with the number of its users. At first all are free."""

    def __init__(self, pages: int):
        self.pages = pages
        self._free = deque(range(pages))
        self._users = [0] * pages
        self._known: dict[Digest, int] = {}
        self._digest: dict[int, Digest] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # known pages without a user, the longest unused first

    @property
    def available(self) -> int:
        """Number of pages that `take` could give."""
        return len(self._free) + len(self._unused)

    @property
    def used(self) -> int:
        """Number of pages that have a user."""
        return self.pages - self.available

    def take(self, count: int) -> list[int] | None:
        """`count` pages with one user each, or None if there are fewer."""
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.popleft()
            else:
                page, _ = self._unused.popitem(last=False)
                del self._known[self._digest.pop(page)]
            self._users[page] = 1
            pages.append(page)
        return pages

    def find(self, prefix: Sequence[Digest]) -> list[int]:
        """Pages of the digests in `prefix`, up to the first digest that is unknown."""
        pages = []
        for digest in prefix:
            if digest not in self._known:
                break
            pages.append(self._known[digest])
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Adds one user to each page."""
        for page in pages:
            self._unused.pop(page, None)
            self._users[page] += 1

    def publish(self, page: int, digest: Digest) -> None:
        """Makes a page known, so that others may share it. It is full and will not change.

        Of two pages with the same content the first stays known.
        """
        if digest not in self._known and page not in self._digest:
            self._known[digest], self._digest[page] = page, digest

    def forget(self) -> None:
        """Makes all pages unknown, after a fault: nothing that was written so far gets a new user."""
        self._free.extend(self._unused)
        for table in (self._unused, self._known, self._digest):
            table.clear()

    def release(self, pages: Sequence[int]) -> None:
        """Takes one user from each page.

        The last pages of a sequence become unused first, and so are evicted first: without the pages before them they
        are of no use.
        """
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._digest:
                    self._unused[page] = None
                else:
                    self._free.append(page)
            elif self._users[page] < 0:
                raise RuntimeError(f"page {page} was released more often than it was taken")
