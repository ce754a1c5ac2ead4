"""Text of the standard library, and a tokenizer trained on it."""

import pytest

from tests.support import stdlib
from tokensieve.tasks import Document, PlainEncoder

MODULES = ("argparse", "ast", "inspect", "textwrap", "typing", "random", "shutil")


@pytest.fixture(scope="module")
def corpus() -> list[Document]:
    return stdlib.documents(*MODULES)


@pytest.fixture(scope="module")
def encode(corpus, tmp_path_factory) -> PlainEncoder:
    return stdlib.encoder(corpus, tmp_path_factory.mktemp("tokenizer"), 1024)
