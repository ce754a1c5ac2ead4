"""Documents, and the rule that divides them into training and test text.

A document belongs to the test split if a hash of its name says so: the same on every machine and under every Python
version. A vendored copy of a module goes where its original goes.
"""

import ast
import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from tokensieve.config import UserError
from tokensieve.tasks.turns import Message

Split = Literal["train", "test"]

VENDORED = frozenset(
    """vendor _vendor vendored _vendored vendored_packages _vendored_packages third_party _third_party extern _extern
    externals""".split()
)


@dataclass(frozen=True)
class Document:
    """One text: `name` is a dotted module name (or a path with dots), stable across machines; `text` is its content.

    messages: the conversation whose texts `text` joins, to be encoded in the tokenizer's chat format.
    """

    name: str
    text: str
    messages: tuple[Message, ...] = ()


def stable_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same in every process and under every Python version."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") / 2**64


def canonical_name(name: str) -> str:
    """The module's name without what vendoring put before it: pip._vendor.requests.sessions -> requests.sessions."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part in VENDORED), default=-1)
    return ".".join(parts[last + 1 :]) or name


def is_held_out(name: str, share: float) -> bool:
    """Whether a document of this name belongs to the test split, which gets `share` (0 to 1) of all names."""
    return stable_fraction(canonical_name(name)) < share


@dataclass(frozen=True)
class Documents:
    """The documents that a task makes its examples from, by split. No name may stand in both splits.

    Raises:
        UserError: a name in both splits.
    """

    test: Sequence[Document] = ()
    train: Sequence[Document] = ()

    def __post_init__(self) -> None:
        shared = {d.name for d in self.test} & {d.name for d in self.train}
        if shared:
            raise UserError(f"document {min(shared)} is in the train and in the test split; divide them by their names")

    @classmethod
    def divide(cls, documents: Iterable[Document], share: float) -> "Documents":
        """Divides documents by `is_held_out`: about `share` of them (0 to 1) become test documents."""
        splits: dict[bool, list[Document]] = {True: [], False: []}
        for document in documents:
            splits[is_held_out(document.name, share)].append(document)
        return cls(splits[True], splits[False])

    def of(self, split: Split) -> Sequence[Document]:
        """The documents of one split."""
        return self.test if split == "test" else self.train


def parse_python(text: str) -> ast.Module | None:
    """The syntax tree, or None if the text is not Python of this interpreter's version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in string literals warn when parsed
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
