"""Text that every machine has, and a tokenizer trained on it."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tokensieve.data import train_tokenizer
from tokensieve.model import load_tokenizer
from tokensieve.tasks import Document, PlainEncoder


def documents(*modules: str) -> list[Document]:
    """The sources of modules of the standard library, one document each."""
    found = []
    for name in modules:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        found.append(Document(name, Path(spec.origin).read_text(encoding="utf-8")))
    return found


def encoder(texts: Iterable[Document], folder: Path, vocab_size: int) -> PlainEncoder:
    """An encoder whose tokenizer is trained on `texts` and saved in `folder`."""
    saved = train_tokenizer((document.text for document in texts), folder, vocab_size=vocab_size)
    return PlainEncoder(Tokenizer.from_file(str(saved / "tokenizer.json")))


def tokenizer(texts: Iterable[Document], folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """The same tokenizer, of transformers."""
    return load_tokenizer(train_tokenizer((document.text for document in texts), folder, vocab_size=vocab_size))
