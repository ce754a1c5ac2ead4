"""Documents as token ids on disk: one flat file, memory-mapped, shared by every worker process.

Folder: tokens.bin (uint16, or uint32 for vocabularies above 65536), offsets.npy (int64, one more than documents),
store.json (names and the tokenizer's hash). A store appears under its name only when it is complete.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokensieve.config import UserError
from tokensieve.files import remedy
from tokensieve.tasks import Document, PlainEncoder, encoder

BATCH = 128  # documents encoded at a time,
CHARS = 1 << 20  # of so many characters in all: a tokenizer at work holds some 150 bytes for each

# Where a text of more characters may be cut: the tokens of the usual tokenizers end at a line's end before text, and at
# a word's end before a space.
SEAMS = (re.compile(r"(?<=\n)(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))


def encoded(documents: Iterable[Document], encode: PlainEncoder) -> Iterator[tuple[str, np.ndarray]]:
    """(name, token ids) of each document, without what `PlainEncoder.frame` puts around it.

    Raises:
        UserError: a conversation, and the tokenizer has no chat format for it.
    """
    for batch in _batches(documents):
        if len(batch[0].text) > CHARS and not batch[0].messages:  # it is alone
            parts = [np.asarray(encode(piece)) for piece in _pieces(batch[0].text)]
            yield batch[0].name, np.concatenate(parts)
            continue
        ids = iter(encode.batch([document.text for document in batch if not document.messages]))
        for document in batch:
            yield document.name, np.asarray(_unframed(document, encode) if document.messages else next(ids))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        if batch and (len(batch) == BATCH or size + len(document.text) > CHARS):
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document.text)
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most `CHARS` characters, each cut at the last seam in its second half."""
    begin = 0
    while len(text) - begin > CHARS:
        middle, end = begin + CHARS // 2, begin + CHARS
        seams = ([found.end() for found in seam.finditer(text, middle, end)] for seam in SEAMS)
        cut = next((places[-1] for places in seams if places), end)
        yield text[begin:cut]
        begin = cut
    yield text[begin:]


def _unframed(document: Document, encode: PlainEncoder) -> list[int]:
    """The conversation's ids without the first and last tokens that every document gets."""
    try:
        ids = encode.conversation(document.messages)
    except UserError as error:
        raise UserError(f"{document.name}: {error}") from error
    before, after = encode.frame()
    ids = ids[len(before) :] if ids[: len(before)] == before else ids
    return ids[: -len(after)] if after and ids[-len(after) :] == after else ids


class TokenStore:
    """Token ids of many documents, without bos and eos: `len(store)` documents, `store[i]` the ids of one.

    `tokens` is the concatenation of all documents, `offsets[i]:offsets[i + 1]` the range of document i.
    """

    def __init__(self, folder: Path, tokens: np.ndarray, offsets: np.ndarray, names: list[str], tokenizer_hash: str):
        self.folder, self.tokens, self.offsets = folder, tokens, offsets
        self.names, self.tokenizer_hash = names, tokenizer_hash

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def __reduce__(self) -> Any:
        return TokenStore.open, (self.folder,)  # a worker maps the file again instead of receiving a copy of it

    @classmethod
    def build(cls, documents: Iterable[Document], tokenizer: Any, folder: str | Path) -> "TokenStore":
        """Encodes documents into a folder, unless it already holds a store made with this tokenizer.

        Raises:
            UserError: no documents, a folder that cannot be written, a full disk.
        """
        encode = encoder(tokenizer)
        return cls.build_from_ids(encoded(documents, encode), encode, folder)

    @classmethod
    def build_from_ids(
        cls, pieces: Iterable[tuple[str, Sequence[int] | np.ndarray]], encode: PlainEncoder, folder: str | Path
    ) -> "TokenStore":
        """As `build`, from (name, token ids) pairs."""
        folder = Path(folder)
        if _is_there(folder, encode):
            return cls.open(folder)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                _write(partial, pieces, encode)
                _put_in_place(partial, folder, encode)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            raise UserError(
                f"token store {folder} cannot be written ({error.strerror}); {remedy(error)}, "
                "or choose another folder with data.cache"
            ) from error
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path) -> "TokenStore":
        """Maps an existing store.

        Raises:
            UserError: the folder holds no complete store.
        """
        folder = Path(folder)
        try:
            header = json.loads((folder / "store.json").read_text(encoding="utf-8"))
            offsets = np.load(folder / "offsets.npy", allow_pickle=False)
            tokens = np.memmap(folder / "tokens.bin", dtype=header["dtype"], mode="r")
            names, tokenizer_hash = header["names"], header["tokenizer"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"token store {folder} is missing or damaged; delete the folder to rebuild it") from error
        if len(offsets) != len(names) + 1 or offsets[-1] != len(tokens):
            raise UserError(f"token store {folder} is truncated; delete the folder to rebuild it")
        return cls(folder, tokens, offsets, names, tokenizer_hash)


def _write(folder: Path, pieces: Iterable[tuple[str, Sequence[int] | np.ndarray]], encode: PlainEncoder) -> None:
    dtype = np.dtype(np.uint16 if encode.vocab_size <= 65536 else np.uint32)
    names, lengths = [], []
    with (folder / "tokens.bin").open("wb") as out:
        for name, ids in pieces:
            if len(ids):
                np.asarray(ids, dtype=dtype).tofile(out)
                names.append(name)
                lengths.append(len(ids))
    if not names:
        raise UserError(
            f"no documents to put into token store {folder.name.lstrip('.')}; name a source that is not empty"
        )
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), allow_pickle=False)
    header = {"dtype": dtype.name, "tokenizer": encode.fingerprint, "names": names}
    (folder / "store.json").write_text(json.dumps(header), encoding="utf-8")


def _is_there(folder: Path, encode: PlainEncoder) -> bool:
    """Whether the folder holds a store made with this tokenizer."""
    return (folder / "store.json").is_file() and TokenStore.open(folder).tokenizer_hash == encode.fingerprint


def _put_in_place(partial: Path, folder: Path, encode: PlainEncoder) -> None:
    """Makes `partial` the folder. The store that another run has made there meanwhile stays."""
    try:
        os.replace(partial, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _is_there(folder, encode):
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, old)
            os.replace(partial, folder)
            shutil.rmtree(old, ignore_errors=True)
