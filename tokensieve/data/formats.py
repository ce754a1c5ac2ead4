"""Files as documents: plain text, JSON Lines, JSON, CSV, Parquet and Arrow, compressed or not.

In a file of rows each row is a document: the string of one field ("text" unless the source names another), or the
conversation of a field that holds messages. What is left out is counted (`LeftOut`).
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from tokensieve.config import UserError
from tokensieve.tasks.documents import Document

MIN_CHARS, MAX_LINE = 400, 1000  # of a Python module worth reading; longer lines look generated
EXAMPLES = 3  # the most names of left-out files that a message gives
BATCH_ROWS = 64  # rows of a Parquet file in memory at a time
DEFAULT_FIELDS = ("text", "messages")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class SourceFile:
    name: str
    path: Path
    size: int  # bytes
    format: str = "text"  # or a key of `ROWS`


class LeftOut:
    """Files and rows that no document was made of, by reason: how many, and the first names."""

    def __init__(self) -> None:
        self.reasons: dict[str, list[str]] = {}
        self.counts: dict[str, int] = {}

    def add(self, reason: str, name: str) -> None:
        names = self.reasons.setdefault(reason, [])
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if len(names) < EXAMPLES:
            names.append(name)

    def __str__(self) -> str:
        """ "2 not UTF-8 text (a.png, b.png), 1 blank (c.txt)"; empty if nothing was left out."""
        parts = []
        for reason, names in self.reasons.items():
            more = ", ..." if self.counts[reason] > len(names) else ""
            parts.append(f"{self.counts[reason]} {reason} ({', '.join(names)}{more})")
        return ", ".join(parts)


def format_of(path: Path, named: bool = False) -> str:
    """The format by the name's ending, without that of a compression.

    named: the source names this file, rather than a folder that holds it. A .json file holds rows only then, since
    folders of code hold other ones.
    """
    suffix = (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()
    known = {".ndjson": "jsonl", ".feather": "arrow"}.get(suffix, suffix[1:])
    return known if known in ROWS and (known != "json" or named) else "text"


def documents_of(file: SourceFile, field: str, left_out: LeftOut, tidy: bool = False) -> Iterator[Document]:
    """The documents of one file.

    Args:
        field: of the rows; empty for the first of `DEFAULT_FIELDS` that a row has.
        tidy: leaves out, uncounted, what is no Python module worth reading.

    Raises:
        UserError: the file cannot be read, is damaged, or has a row without the field.
    """
    if file.format == "text":
        if field:
            raise UserError(f"{file.path} is plain text and has no field {field!r}; leave #{field} out")
        text = _read_text(file, left_out)
        if text is not None and not (tidy and (len(text) < MIN_CHARS or max(map(len, text.split("\n"))) > MAX_LINE)):
            yield Document(file.name, text)
        return
    with _reading(file.path):
        for number, row in ROWS[file.format](file.path):
            where = f"{file.path} {'line' if file.format == 'jsonl' else 'row'} {number}"
            document = row_document(row, field, f"{file.name}:{number}", where, left_out)
            if document:
                yield document


def row_document(row: Any, field: str, name: str, where: str, left_out: LeftOut) -> Document | None:
    """The document of a row, or None if its text is blank or no Unicode text.

    Raises:
        UserError: no such field, or one that holds neither text nor messages.
    """
    if not isinstance(row, Mapping):
        raise UserError(f'{where} is not an object with fields; each row needs {{"text": "..."}} or messages')
    asked = (field,) if field else DEFAULT_FIELDS
    found = next((key for key in asked if key in row), None)
    if found is None:
        columns = ", ".join(str(key)[:40] for key in row) or "none"
        raise UserError(f'{where} has no "{asked[0]}" field (it has {columns}); name the field: SOURCE#FIELD')
    value = row[found]
    if isinstance(value, list):
        messages = tuple(_message(message, where) for message in value)
        document = Document(name, "\n\n".join(message["content"] for message in messages), messages)
    elif value is None or isinstance(value, str):
        document = Document(name, value or "")
    else:
        raise UserError(f'{where} has no "{found}" string or messages, but {type(value).__name__}; name another field')
    if not document.text.strip():
        left_out.add("blank", name)
    elif document.text.encode("utf-8", "ignore") != document.text.encode("utf-8", "surrogatepass"):
        left_out.add("with half a surrogate pair", name)  # which JSON can smuggle in and UTF-8 cannot hold
    else:
        return document
    return None


def _message(message: Any, where: str) -> dict[str, str]:
    given = {key: value for key, value in message.items() if value} if isinstance(message, Mapping) else {}
    given.setdefault("content", "")
    if given.keys() != {"role", "content"} or not all(isinstance(value, str) for value in given.values()):
        raise UserError(f"{where}: a message must hold a role and a content, both text, and nothing else; convert it")
    return given


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from error
    except csv.Error as error:
        raise UserError(f"{path} is not CSV ({error}); repair it") from error
    except _damage() as error:
        raise UserError(f"{path} is damaged ({error}); fetch or write it again") from error
    except OSError as error:
        if error.errno is None:  # a decompressor's own
            raise UserError(f"{path} is damaged ({error}); fetch or write it again") from error
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def _damage() -> tuple[type[Exception], ...]:
    """What the readers raise for a damaged file; those of pyarrow if one of its readers was at work."""
    arrow = sys.modules.get("pyarrow")
    return (EOFError, zlib.error, lzma.LZMAError, *((arrow.ArrowException,) if arrow else ()))


def _pyarrow(path: Path) -> ModuleType:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"{path} needs the package pyarrow; pip install pyarrow") from error
    return pyarrow


def _zstd(path: Path) -> BinaryIO:
    return io.BufferedReader(_pyarrow(path).input_stream(str(path), compression="zstd"))


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstd,
}


def _bytes(path: Path) -> BinaryIO:
    """The file's content as a stream, decompressed."""
    return COMPRESSIONS.get(path.suffix.lower(), lambda path: path.open("rb"))(path)


def _lines(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(_bytes(path), encoding="utf-8-sig", newline="")


def _read_text(file: SourceFile, left_out: LeftOut) -> str | None:
    """The file's text, or None if it is blank, binary or in an encoding other than the one it declares."""
    with _reading(file.path), _bytes(file.path) as stream:
        content = stream.read()
    try:
        encoding = "utf-8-sig"
        if file.path.suffix == ".py":
            encoding = tokenize.detect_encoding(io.BytesIO(content).readline)[0]
        text = content.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        left_out.add("not UTF-8 text", file.name)
        return None
    if "\0" in text:
        left_out.add("binary", file.name)
        return None
    if not text.strip():
        left_out.add("blank", file.name)
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with _lines(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _parsed(line, f"{path} line {number}")


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a list, or of JSON Lines under this name."""
    with _lines(path) as lines:
        if lines.read(1).strip() != "[":
            yield from _json_lines(path)
            return
        yield from enumerate(_parsed("[" + lines.read(), str(path)), 1)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({getattr(error, 'msg', error)}); repair or remove it") from error


def _csv(path: Path, delimiter: str = ",") -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(1 << 30)  # a text is longer than the default of 128 KiB
    with _lines(path) as lines:
        yield from enumerate(csv.DictReader(lines, delimiter=delimiter, strict=True), 1)


def _tsv(path: Path) -> Iterator[tuple[int, Row]]:
    return _csv(path, "\t")


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    _pyarrow(path)
    from pyarrow import parquet

    with parquet.ParquetFile(path) as table:
        yield from _numbered(table.iter_batches(batch_size=BATCH_ROWS))


def _arrow(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows of either of Arrow's two file formats: a stream, which `datasets` writes, or a file with an index."""
    pyarrow = _pyarrow(path)
    with pyarrow.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            opened = pyarrow.ipc.open_file(source)
            yield from _numbered(opened.get_batch(i) for i in range(opened.num_record_batches))
        else:
            source.seek(0)
            yield from _numbered(pyarrow.ipc.open_stream(source))


def _numbered(batches: Iterable[Any]) -> Iterator[tuple[int, Row]]:
    number = 0
    for batch in batches:
        for begin in range(0, batch.num_rows, BATCH_ROWS):
            for row in batch.slice(begin, BATCH_ROWS).to_pylist():
                number += 1
                yield number, row


ROWS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    "jsonl": _json_lines,
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "parquet": _parquet,
    "arrow": _arrow,
}
