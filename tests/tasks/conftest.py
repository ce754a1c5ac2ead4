"""Text of the standard library, and a tokenizer trained on it."""

import importlib.util
from pathlib import Path

import pytest

from tokensieve.data import train_tokenizer
from tokensieve.tasks import Document, PlainEncoder

MODULES = ("argparse", "ast", "inspect", "textwrap", "typing", "random", "shutil")


@pytest.fixture(scope="module")
def corpus() -> list[Document]:
    found = []
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        found.append(Document(name, Path(spec.origin).read_text(encoding="utf-8")))
    return found


@pytest.fixture(scope="module")
def encode(corpus, tmp_path_factory) -> PlainEncoder:
    from tokenizers import Tokenizer

    folder = train_tokenizer((d.text for d in corpus), tmp_path_factory.mktemp("tokenizer"), vocab_size=1024)
    return PlainEncoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
