"""The lengths of a source's documents, and the texts of it in which attention is measured."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.data import Document, read_documents
from tokensieve.data.sources import source_files, split_field
from tokensieve.data.store import encoded
from tokensieve.tasks import PlainEncoder, stable_fraction

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
POSITIONS = tuple(1024 << i for i in range(11))  # past which the share of tokens is given: 1K to 1M
STEPS = 2  # bars of the histogram for each doubling of the length


@dataclass(frozen=True)
class Sample:
    """Documents of a source as token ids, without what training puts around them.

    bytes: of their text. whole: the source holds nothing else.
    """

    documents: tuple[tuple[str, np.ndarray], ...]
    bytes: int
    whole: bool

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64."""
        return np.array([len(ids) for _, ids in self.documents], dtype=np.int64)

    def share_past(self, position: int) -> float:
        """The share of all tokens that see more than `position` keys: those with as many tokens before them."""
        lengths = self.lengths
        return float(np.maximum(lengths - position, 0).sum() / lengths.sum())

    def to_dict(self) -> dict[str, Any]:
        """The figures of metrics.json: counts, quantiles, shares of tokens past positions, and a histogram.

        The histogram's bars are equally wide on a logarithmic axis; `documents` and `tokens` count in each of them.
        """
        lengths = self.lengths
        longest = int(lengths.max())
        begin, end = (math.floor(STEPS * math.log2(n)) for n in (int(lengths.min()), longest))
        edges = 2.0 ** (np.arange(begin, end + 2) / STEPS)
        bar = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, len(edges) - 2)
        past = [position for position in POSITIONS if position < longest] or [POSITIONS[0]]
        return {
            "documents": len(lengths),
            "tokens": int(lengths.sum()),
            "bytes": self.bytes,
            "whole": self.whole,
            "mean": float(lengths.mean()),
            "quantiles": {f"{q:g}": float(np.quantile(lengths, q)) for q in QUANTILES},
            "tokens_past": {str(position): self.share_past(position) for position in past},
            "histogram": {
                "edges": edges.tolist(),
                "documents": np.bincount(bar, minlength=len(edges) - 1).tolist(),
                "tokens": np.bincount(bar, weights=lengths, minlength=len(edges) - 1).astype(int).tolist(),
            },
        }


def read_sample(source: str, encode: PlainEncoder, limit_bytes: int) -> Sample:
    """Documents of a source, of training and held-out ones alike, up to about `limit_bytes` of text.

    Of files it is a choice by a hash of their names, of rows and streams the first ones.

    Raises:
        UserError: the source is missing, unreadable or empty, or every document of it is shorter than two tokens.
    """
    size = 0

    def counted() -> Iterator[Document]:
        nonlocal size
        for document in read_documents(source, "all", limit_bytes=limit_bytes):
            size += len(document.text.encode())
            yield document

    documents = tuple((name, ids) for name, ids in encoded(counted(), encode) if len(ids))
    if max((len(ids) for _, ids in documents), default=0) < 2:
        raise UserError(f"data source {source!r}: every text is shorter than 2 tokens; name a source of longer texts")
    local = not source.startswith("hf:")
    listed = sum(file.size for file in source_files(split_field(source)[0])) if local else 0
    return Sample(documents, size, size < limit_bytes and listed <= limit_bytes)


def draw(sample: Sample, encode: PlainEncoder, count: int, shortest: int, context: int) -> list[Tensor]:
    """At most `count` texts of more than `shortest` tokens, int64 (S) each: bos, then the document, cut at `context`.

    They are drawn by a hash of their names, without replacement and with probabilities in proportion to their tokens,
    so that a mean over texts is about a mean over the source's tokens. Source: Efraimidis and Spirakis, Information
    Processing Letters 97 (2006) 181.
    """

    def order(entry: tuple[str, np.ndarray]) -> float:
        name, ids = entry
        return math.log(max(stable_fraction("profile " + name), 2.0**-64)) / min(len(ids), context)

    begin = np.array(encode.begin, dtype=np.int64)
    long = [entry for entry in sample.documents if len(begin) + len(entry[1]) > shortest]
    chosen = sorted(long, key=order, reverse=True)[:count]
    return [torch.from_numpy(np.concatenate([begin, ids.astype(np.int64)])[:context]) for _, ids in chosen]
