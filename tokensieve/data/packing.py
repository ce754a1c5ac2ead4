"""Training sequences: streams of packed documents and generated needles, mixed by weight.

Sequence i is a function of (seed, i) and of the stores alone, so resuming at i needs no state and workers need not
agree on anything. A sequence is `context` tokens:

    input_ids     the tokens
    position_ids  counts up within a document and restarts at 0 where the next one begins
    labels        input_ids, -100 at the first token of every document
"""

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from tokensieve.config import GENERATED, DataConfig, UserError
from tokensieve.data.sources import SplitName, read_documents, source_fingerprint
from tokensieve.data.store import TokenStore
from tokensieve.tasks import Document, PlainEncoder, dialogue, encoder, retrieval

CHAT_BYTES = 24_000_000  # of source text to take functions from
SHORTEST_RETRIEVAL = 512  # tokens of a needle document


class PackedRow(NamedTuple):
    ids: np.ndarray  # (context,) tokens
    starts: np.ndarray  # positions at which documents begin, 0 first
    answers: np.ndarray | None = None  # (context,) bool: tokens that only the context can tell


class Stream(Protocol):
    def sequence(self, number: int) -> PackedRow:
        """The stream's `number`-th sequence: a function of the number alone."""


class PackedTextStream:
    """Documents in an order drawn anew for every epoch, joined and cut into sequences: no token is lost or padded.

    A document that is cut continues in the next sequence as a document of its own.

    framed: the stored documents have their first and last tokens already; others get `PlainEncoder.frame`'s.
    """

    def __init__(self, store: TokenStore, encode: PlainEncoder, context: int, seed: int, framed: bool):
        self.store, self.context, self.seed = store, context, seed
        self.before, self.after = ([], []) if framed else encode.frame()
        self.lengths = np.diff(store.offsets) + len(self.before) + len(self.after)
        self.total = int(self.lengths.sum())
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of documents and the position at which each begins; kept because neighbours share it."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))
            begins = np.concatenate([[0], np.cumsum(self.lengths[order])])
            self._epoch = (epoch, order, begins)
        return self._epoch[1], self._epoch[2]

    def sequence(self, number: int) -> PackedRow:
        ids = np.empty(self.context, dtype=np.int64)
        starts = []
        filled = 0
        epoch, position = divmod(number * self.context, self.total)
        while filled < self.context:
            order, begins = self._order(epoch)
            place = int(np.searchsorted(begins, position, side="right")) - 1
            while filled < self.context and place < len(order):
                piece = np.concatenate([self.before, self.store[order[place]], self.after])
                piece = piece[position - begins[place] :][: self.context - filled]
                ids[filled : filled + len(piece)] = piece
                starts.append(filled)
                filled += len(piece)
                position += len(piece)
                place += 1
            epoch, position = epoch + 1, 0
        return PackedRow(ids, np.array(starts))


class RetrievalStream:
    """Needle documents in slices of the stored text (modules of one package lie side by side).

    Half of the sequences are one document, the others two, four, ... equal ones. Short documents hold more answers per
    token, which teaches the model to match a key; long ones teach the distance.
    """

    def __init__(self, store: TokenStore, encode: PlainEncoder, context: int, seed: int):
        if len(store.tokens) < 2 * context:
            raise UserError(
                f"{len(store.tokens)} tokens of text are too few for needles in a context of {context}; "
                "name a larger source or shorten the context"
            )
        self.store, self.encode, self.context, self.seed = store, encode, context, seed
        self.bounds = retrieval.LineBounds(encode)

    def _take(self, rng: random.Random, length: int) -> np.ndarray:
        """A slice of the text that ends at the end of a line, so that the question follows a whole one."""
        end = rng.randrange(length, len(self.store.tokens) + 1)
        reach = self.store.tokens[max(length, end - 256) : end]
        ends = np.flatnonzero(self.bounds.ends[reach])
        if len(ends):
            end -= len(reach) - 1 - int(ends[-1])
        return self.store.tokens[end - length : end]

    def sequence(self, number: int) -> PackedRow:
        digest = hashlib.blake2b(f"retrieval {self.seed} {number}".encode(), digest_size=8).digest()
        rng = random.Random(int.from_bytes(digest, "big"))
        halvings = max(0, (self.context // SHORTEST_RETRIEVAL).bit_length() - 1)
        pieces = 1 << (rng.randint(1, halvings) if halvings and rng.random() < 0.5 else 0)
        length = self.context // pieces
        lengths = [length] * (pieces - 1) + [self.context - length * (pieces - 1)]
        drawn = [retrieval.training_sequence(rng, self.encode, self.bounds, self._take, n) for n in lengths]
        ids = np.concatenate([ids for ids, _ in drawn])
        return PackedRow(ids, np.arange(pieces) * length, np.concatenate([answers for _, answers in drawn]))


class PackedDataset(Dataset):
    """Map-style: item i is a dict of tensors of shape (context,): input_ids, labels and position_ids, all int64.

    With an `answer_weight` other than 1 there are loss_weights (float32) too: that number at answers that only the
    context can tell, and 1 elsewhere. `fingerprint` changes whenever the items would, so a resumed run can check that
    it still reads the same data.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        weights: Sequence[float],
        sequences: int,
        seed: int,
        fingerprint: str = "",
        answer_weight: float = 1.0,
    ):
        if not streams or len(streams) != len(weights) or min(weights) < 0 or sum(weights) <= 0:
            raise UserError("the data mixture needs sources with weights of 0 or more that do not sum to 0")
        self.streams, self.fingerprint, self.answer_weight = list(streams), fingerprint, answer_weight
        edges = np.cumsum(weights) / np.sum(weights)
        # Drawn one by one from a seeded generator: a longer run begins with the same choices.
        draws = np.random.default_rng([seed, 0x6D6978]).random(sequences)
        self.choice = np.minimum(np.searchsorted(edges, draws, side="right"), len(streams) - 1).astype(np.int32)
        self.number = np.zeros(sequences, dtype=np.int64)
        for stream in range(len(streams)):
            chosen = self.choice == stream
            self.number[chosen] = np.arange(chosen.sum())

    def __len__(self) -> int:
        return len(self.choice)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        ids, starts, answers = self.streams[self.choice[index]].sequence(int(self.number[index]))
        item = packed_item(ids, starts)
        if self.answer_weight != 1:
            item["loss_weights"] = torch.ones(len(ids))
            if answers is not None:
                item["loss_weights"][torch.from_numpy(answers)] = self.answer_weight
        return item


def packed_item(ids: np.ndarray, starts: np.ndarray) -> dict[str, torch.Tensor]:
    """A batch item from tokens and the positions where documents begin."""
    begin = np.zeros(len(ids), dtype=np.int64)
    begin[starts] = starts
    labels = ids.astype(np.int64)
    labels[starts] = -100
    positions = np.arange(len(ids)) - np.maximum.accumulate(begin)
    return {
        "input_ids": torch.from_numpy(ids.astype(np.int64)),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
    }


def text_source(config: DataConfig) -> str:
    """The first plain source of the mixture, or "python": examples are made from it, and evaluations read it."""
    return next((entry.source for entry in config.sources if entry.source not in GENERATED), "python")


def user_cache() -> Path:
    """The folder of tokenized text if the config names none."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokensieve"


def _store(
    config: DataConfig, source: str, listing: str, encode: PlainEncoder, split: SplitName, kind: str
) -> tuple[TokenStore, str]:
    limit = config.limit_bytes
    if kind == "chat":
        limit = min(limit or CHAT_BYTES, CHAT_BYTES)
    key = repr((kind, source, listing, split, config.held_out_share, limit, encode.fingerprint))
    cache = Path(config.cache).expanduser() if config.cache else user_cache()
    folder = cache / hashlib.blake2b(key.encode(), digest_size=10).hexdigest()

    def documents() -> Iterator[Document]:
        yield from read_documents(source, split, config.held_out_share, limit)

    if kind == "chat":
        store = TokenStore.build_from_ids(dialogue.encoded_examples(documents(), encode), encode, folder)
    else:
        store = TokenStore.build(documents(), encode, folder)
    return store, key


def build_dataset(
    config: DataConfig, tokenizer: Any, context: int, sequences: int, seed: int, split: SplitName = "train"
) -> PackedDataset:
    """The mixture that a config names, tokenized into `config.cache` on first use.

    "retrieval" and "chat" make their examples from `text_source`.

    Args:
        context: tokens per sequence.
        sequences: length of the dataset; the first n items do not depend on it.
        split: "train", "test" or "all".

    Raises:
        UserError: a source is missing, unreadable or empty; the tokenizer has neither bos nor eos; or "chat" is a
            source and the tokenizer has no chat format.
    """
    encode = encoder(tokenizer)
    text = text_source(config)
    streams: list[Stream] = []
    listings: dict[str, str] = {}
    keys = [repr((context, seed, [entry.weight for entry in config.sources], config.answer_weight))]
    for number, entry in enumerate(config.sources):
        stream_seed = seed * 1009 + number
        kind = entry.source if entry.source in GENERATED else "text"
        source = text if kind in GENERATED else entry.source
        if source not in listings:
            listings[source] = source_fingerprint(source)
        stored = "chat" if kind == "chat" else "text"
        store, key = _store(config, source, listings[source], encode, split, stored)
        keys.append(kind + key)
        if kind == "retrieval":
            streams.append(RetrievalStream(store, encode, context, stream_seed))
        else:
            streams.append(PackedTextStream(store, encode, context, stream_seed, framed=kind == "chat"))
    fingerprint = hashlib.blake2b("\n".join(keys).encode(), digest_size=16).hexdigest()
    weights = [entry.weight for entry in config.sources]
    return PackedDataset(streams, weights, sequences, seed, fingerprint, config.answer_weight)
