"""Documents as token ids on disk: one flat file, memory-mapped, shared by every worker process.

Folder: tokens.bin (uint16, or uint32 for vocabularies above 65536), offsets.npy (int64, one more than documents),
store.json (names and the tokenizer's hash). A store appears under its name only when it is complete.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tokensieve.config import UserError
from tokensieve.tasks import Document, PlainEncoder, encoder

BATCH = 128  # documents encoded at a time


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, BATCH)):
        yield batch


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
        pairs = (
            pair
            for batch in _batches(documents)
            for pair in zip(batch, encode.batch([document.text for document in batch]), strict=True)
        )
        return cls.build_from_ids(((document.name, ids) for document, ids in pairs), encode, folder)

    @classmethod
    def build_from_ids(
        cls, pieces: Iterable[tuple[str, list[int]]], encode: PlainEncoder, folder: str | Path
    ) -> "TokenStore":
        """As `build`, from (name, token ids) pairs."""
        folder = Path(folder)
        if (folder / "store.json").is_file():
            present = cls.open(folder)
            if present.tokenizer_hash == encode.fingerprint:
                return present
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                _write(partial, pieces, encode)
                _put_in_place(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            remedy = "free some space" if error.errno == errno.ENOSPC else "choose another cache folder"
            raise UserError(f"token store {folder} cannot be written ({error.strerror}); {remedy}") from error
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


def _write(folder: Path, pieces: Iterable[tuple[str, list[int]]], encode: PlainEncoder) -> None:
    dtype = np.dtype(np.uint16 if encode.vocab_size <= 65536 else np.uint32)
    names, lengths = [], []
    with (folder / "tokens.bin").open("wb") as out:
        for name, ids in pieces:
            if ids:
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


def _put_in_place(partial: Path, folder: Path) -> None:
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(partial, folder)
