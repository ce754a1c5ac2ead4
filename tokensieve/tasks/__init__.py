"""What every task shares: a document, the chat markers, and an encoder that never mistakes text for a marker.

One file per family of tasks: `retrieval` (needles in real text), `chat` (short turns about real functions) and
`completion` (bodies of held-out functions). Each makes examples and evaluates a model on them.
"""

import ast
import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokensieve.config import UserError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, END_THINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"


@dataclass(frozen=True)
class Document:
    """One text: `name` is a dotted module name (or a path with dots), stable across machines; `text` is its content."""

    name: str
    text: str


def stable_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same in every process and under every Python version."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") / 2**64


def parse_python(text: str) -> ast.Module | None:
    """The syntax tree, or None when the text is not Python of this interpreter's version."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in string literals warn when parsed
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


@dataclass(frozen=True)
class Markers:
    """Token ids of the chat markers of one tokenizer."""

    bos: int
    eos: int
    pad: int
    user: int
    assistant: int
    think: int
    end_think: int


class PlainEncoder:
    """Text -> token ids, in which a marker that is spelled out in the text stays ordinary text.

    Takes a transformers tokenizer or a `tokenizers.Tokenizer`; works on a copy and leaves the original as it was.

    Raises:
        UserError: the tokenizer has no Rust backend, or lacks one of the chat markers.
    """

    def __init__(self, tokenizer: Any):
        raw = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(raw, "encode_batch_fast"):
            raise UserError(f"{type(tokenizer).__name__} has no `tokenizers` backend; use one with a tokenizer.json")
        self.serialized: str = raw.to_str()
        self._load()
        ids = []
        for marker in (BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK):
            token_id = self.raw.token_to_id(marker)
            if token_id is None:
                raise UserError(f"the tokenizer lacks the marker {marker}; use a DeepSeek tokenizer or train one")
            ids.append(token_id)
        self.markers = Markers(*ids)
        self.fingerprint = hashlib.blake2b(self.serialized.encode(), digest_size=16).hexdigest()

    def _load(self) -> None:
        from tokenizers import Tokenizer

        self.raw = Tokenizer.from_str(self.serialized)
        self.raw.encode_special_tokens = True
        self.raw.no_truncation()
        self.raw.no_padding()

    def __getstate__(self) -> dict[str, Any]:
        # The Rust object would come back without encode_special_tokens: it is not part of its serialized form.
        return {name: value for name, value in self.__dict__.items() if name != "raw"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    @property
    def vocab_size(self) -> int:
        return self.raw.get_vocab_size(with_added_tokens=True)

    def __call__(self, text: str) -> list[int]:
        return self.raw.encode(text, add_special_tokens=False).ids

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes many texts on all cores."""
        return [encoding.ids for encoding in self.raw.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.raw.decode(list(ids), skip_special_tokens=False)
