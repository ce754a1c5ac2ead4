"""What the engine's tests share: a small sparse model and the bundled tokenizer."""

from typing import Any

import pytest

import tokensieve
from tests.support.models import config, ours
from tokensieve.model import DecoderForCausalLM


@pytest.fixture(scope="module")
def sparse() -> DecoderForCausalLM:
    return ours(config("v32"), seed=1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokensieve.load_tokenizer("base")
