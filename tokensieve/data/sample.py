"""A few rows of a source's text, for what reads activations and trains nothing."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.data.store import encoded
from tokensieve.tasks import Document, encoder
from tokensieve.tasks.documents import stable_fraction

FEWEST = 256  # tokens of a row
CALIBRATION_BYTES = 2_000_000  # of text to draw some thousand tokens from


def sample_rows(tokenizer: Any, documents: Iterable[Document], rows: int, longest: int) -> Tensor:
    """Token ids (rows, S) int64: documents in an order drawn by a hash of their names, joined and cut.

    S is `longest` if there is so much text, else as much as there is, and at least 256. A tokenizer with a bos puts it
    before each document. UserError for less text.
    """
    encode = encoder(tokenizer)
    drawn = sorted(documents, key=lambda document: stable_fraction("sample " + document.name))
    ids: list[int] = []
    for _, tokens in encoded(drawn, encode):
        ids.extend(chain(encode.begin, tokens.tolist()))
        if len(ids) >= rows * longest:
            break
    length = min(longest, len(ids) // rows)
    if length < min(FEWEST, longest):
        raise UserError(f"the text has {len(ids)} tokens; give at least {rows * FEWEST}")
    return torch.tensor(ids[: rows * length]).view(rows, length)
