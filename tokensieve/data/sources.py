"""The sources of text: the Python around us, a folder, a file, a glob, JSONL, or a Hugging Face dataset.

Documents are split into training and held-out ones by a hash of their name (`tasks.documents`). For Python that is the
module's name, so a module stays held out under another Python version or prefix. Training text that mostly repeats
held-out text is dropped.
"""

import functools
import glob
import hashlib
import importlib.metadata
import io
import json
import re
import site
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from tokensieve.config import UserError
from tokensieve.tasks.documents import VENDORED, Document, Split, is_held_out, stable_fraction

SplitName = Split | Literal["all"]

MIN_CHARS, MAX_BYTES, MAX_LINE = 400, 400_000, 1000  # of a Python module worth reading; longer lines look generated
NEAR_DUPLICATE = 0.5  # share of a file's lines that also occur in held-out files
PERMISSIVE_SPDX = frozenset(
    """MIT MIT-0 MIT-CMU HPND BSD-2-Clause BSD-3-Clause 0BSD Apache-2.0 ISC PSF-2.0 Python-2.0 Unlicense Zlib CC0-1.0
    BSL-1.0 CNRI-Python NCSA""".lower().split()
)
PERMISSIVE = re.compile(r"\b(MIT|0?BSD|Apache|ISC|ISCL|PSF|Python Software Foundation|Unlicense|Zlib|HPND|CC0)\b", re.I)
RESTRICTED = re.compile(r"GPL|General Public|MPL|Mozilla|propriet|commercial|EULA|NVIDIA|Other/|restrict", re.I)


@dataclass(frozen=True)
class SourceFile:
    name: str
    path: Path
    size: int  # bytes


def _permissive(metadata: importlib.metadata.PackageMetadata) -> str | None:
    """The licence's name if the metadata says, in one way or another, that it is permissive."""

    def first(field: str) -> str:
        return (metadata.get_all(field) or [""])[0].strip()

    name = first("Name").lower()
    if not name or name.startswith(("nvidia", "cuda", "tokensieve")):
        return None
    expression = first("License-Expression")
    if expression:
        terms = re.sub(r"\s+WITH\s+\S+", "", expression.replace("(", " ").replace(")", " "), flags=re.I)
        groups = [re.split(r"\s+OR\s+", group, flags=re.I) for group in re.split(r"\s+AND\s+", terms, flags=re.I)]
        fine = all(any(term.strip().lower() in PERMISSIVE_SPDX for term in group) for group in groups)
        return expression if fine else None
    classifiers = [entry for entry in metadata.get_all("Classifier") or [] if entry.startswith("License ::")]
    classifiers = [entry.split("::")[-1].strip() for entry in classifiers if entry.count("::") > 1]
    short = first("License")
    names = classifiers or ([short] if 0 < len(short) <= 60 and "\n" not in short else [])
    if not names or any(RESTRICTED.search(entry) or not PERMISSIVE.search(entry) for entry in names):
        return None
    return ", ".join(names)


def _distributions() -> list[tuple[importlib.metadata.Distribution, str]]:
    """The permissively licensed packages beside this interpreter, each once, sorted by name."""
    paths = sysconfig.get_paths()
    folders = [paths["purelib"], paths["platlib"], *site.getsitepackages()]
    packages: dict[str, tuple[importlib.metadata.Distribution, str]] = {}
    for distribution in importlib.metadata.distributions(path=list(dict.fromkeys(folders))):
        licence = _permissive(distribution.metadata)
        if licence and distribution.files:
            packages.setdefault(distribution.metadata["Name"].lower(), (distribution, licence))
    return [packages[name] for name in sorted(packages)]


def licences() -> dict[str, str]:
    """Package -> licence for everything that the source "python" reads on this machine."""
    return {"python": "PSF-2.0"} | {d.metadata["Name"]: licence for d, licence in _distributions()}


def _module_name(parts: Iterable[str]) -> str:
    name = ".".join(parts).removesuffix(".py")
    return name.removesuffix(".__init__")


@functools.cache  # thousands of files, which stay the same while this interpreter runs
def _python_files() -> tuple[SourceFile, ...]:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    candidates: dict[str, Path] = {}
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).parts
        if not {"site-packages", "dist-packages", "__pycache__"} & set(parts):
            candidates[_module_name(parts)] = path
    for distribution, _ in _distributions():
        for entry in distribution.files or []:
            folders = set(entry.parts[:-1])
            # A vendored copy repeats an installed package or comes under a licence that nothing here states.
            if entry.suffix == ".py" and not folders & ({"..", "test", "tests", "__pycache__"} | VENDORED):
                candidates.setdefault(_module_name(entry.parts), Path(str(distribution.locate_file(entry))))
    files = []
    for name, path in candidates.items():
        try:
            size = path.stat().st_size
        except OSError:
            continue  # RECORD lists files that a distributor may have removed
        if MIN_CHARS <= size <= MAX_BYTES:
            files.append(SourceFile(name, path, size))
    return tuple(files)


def _listed(paths: Iterable[Path], root: Path) -> list[SourceFile]:
    files = []
    for path in paths:
        parts = path.relative_to(root).parts
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in parts):
            files.append(SourceFile(_module_name(parts), path, path.stat().st_size))
    return files


def source_files(source: str) -> list[SourceFile]:
    """The files behind a source, sorted by name; UserError when there are none. Not for "hf:" sources."""
    path = Path(source).expanduser()
    try:
        if source == "python":
            files: Sequence[SourceFile] = _python_files()
        elif path.is_dir():
            files = _listed(path.rglob("*"), path)
        elif path.is_file():
            files = [SourceFile(_module_name([path.name]), path, path.stat().st_size)]
        elif glob.has_magic(source):
            matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
            files = _listed(matches, Path(*path.parts[: [glob.has_magic(part) for part in path.parts].index(True)]))
        else:
            raise UserError(
                f"data source {source!r} does not exist; name a folder, file, glob, .jsonl, hf:NAME or python"
            )
    except OSError as error:
        raise UserError(f"data source {source!r} cannot be read ({error.strerror}); check its permissions") from error
    if not files:
        raise UserError(f"data source {source!r} holds no files; check the path or the pattern")
    return sorted(files, key=lambda file: (file.name, str(file.path)))


def _read_text(file: SourceFile) -> str | None:
    """The file's text, or None when it is binary or in an encoding other than the one it declares."""
    try:
        content = file.path.read_bytes()
    except OSError as error:
        raise UserError(f"{file.path} cannot be read ({error.strerror}); check its permissions") from error
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(content).readline)[0] if file.path.suffix == ".py" else "utf-8"
        text = content.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        return None
    if not text.strip() or "\0" in text:
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _documents(file: SourceFile, tidy: bool) -> Iterator[Document]:
    if file.path.suffix == ".jsonl":
        yield from _json_lines(file)
        return
    text = _read_text(file)
    if text is None or (tidy and (len(text) < MIN_CHARS or max(map(len, text.split("\n"))) > MAX_LINE)):
        return
    yield Document(file.name, text)


def _sound(text: str) -> bool:
    """Not blank, and without the lone surrogates that JSON escapes can smuggle in and UTF-8 cannot hold."""
    return bool(text.strip()) and text.encode("utf-8", "ignore") == text.encode("utf-8", "surrogatepass")


def _json_lines(file: SourceFile) -> Iterator[Document]:
    try:
        with file.path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                    raise UserError(
                        f'{file.path} line {number} has no "text" string; each line needs {{"text": "..."}}'
                    )
                if _sound(record["text"]):
                    yield Document(f"{file.name}:{number}", record["text"])
    except json.JSONDecodeError as error:
        raise UserError(f"{file.path} line {number} is not JSON ({error.msg}); repair or remove the line") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file.path} is not UTF-8 (byte {error.start}); convert it first") from error
    except OSError as error:
        raise UserError(f"{file.path} cannot be read ({error.strerror}); check its permissions") from error


def _hugging_face(source: str) -> Iterator[Document]:
    name, config, split = (source.removeprefix("hf:").split(":") + [""] * 2)[:3]
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"data source {source!r} needs the package datasets; pip install datasets") from error
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data source {source!r} cannot be opened ({reason}); check name, config and network"
        ) from error
    for number, row in enumerate(rows):
        if not isinstance(row.get("text"), str):
            raise UserError(f'data source {source!r} has no "text" column; its columns are {", ".join(row)}')
        if _sound(row["text"]):
            yield Document(f"{name}:{number}", row["text"])


def telling_lines(text: str) -> set[str]:
    """The stripped lines of a text that tell texts apart: 20 characters or more, and no comment."""
    lines = (line.strip() for line in text.split("\n"))
    return {line for line in lines if len(line) >= 20 and not line.startswith("#")}


def _within(files: list[SourceFile], limit_bytes: int | None) -> list[SourceFile]:
    """A choice of files of `limit_bytes` in all: by a hash of their names, so that it is a fair sample."""
    if limit_bytes is None or sum(file.size for file in files) <= limit_bytes:
        return files
    chosen, total = [], 0
    for file in sorted(files, key=lambda file: stable_fraction("limit " + file.name)):
        if total >= limit_bytes:
            break
        chosen.append(file)
        total += file.size
    return sorted(chosen, key=lambda file: (file.name, str(file.path)))


def read_documents(
    source: str, split: SplitName = "train", held_out_share: float = 0.02, limit_bytes: int | None = None
) -> Iterator[Document]:
    """The documents of one split of a source, in the order of their names.

    Args:
        source: "python" (the standard library and the permissively licensed packages beside it), a folder, a file, a
            glob, a .jsonl file with a "text" field, or "hf:NAME[:config][:split]" (streamed).
        split: "train", "test" (held out of training) or "all". A single text file is all training text.
        held_out_share: share of the documents held out, 0 to 1.
        limit_bytes: about how much to read; a sample of the files, or the first documents of a stream.

    Raises:
        UserError: the source is missing, unreadable or empty (nothing in this split counts as empty).
    """
    if source.startswith("hf:"):
        return _not_empty(_streamed(_hugging_face(source), split, held_out_share, limit_bytes), source, split)
    files = source_files(source)
    return _not_empty(_from_files(files, source == "python", split, held_out_share, limit_bytes), source, split)


def _not_empty(documents: Iterator[Document], source: str, split: SplitName) -> Iterator[Document]:
    first = list(islice(documents, 1))
    if not first:
        what = "readable text" if split == "all" else f"readable text in its {split} split"
        raise UserError(f"data source {source!r} has no {what}; name a larger source or change held_out_share")
    yield from first
    yield from documents


def _streamed(
    documents: Iterator[Document], split: SplitName, share: float, limit_bytes: int | None
) -> Iterator[Document]:
    total = 0
    for document in documents:
        if split == "all" or is_held_out(document.name, share) == (split == "test"):
            yield document
            total += len(document.text.encode())
            if limit_bytes is not None and total >= limit_bytes:
                return


def _from_files(
    files: list[SourceFile], tidy: bool, split: SplitName, share: float, limit_bytes: int | None
) -> Iterator[Document]:
    lined = [file for file in files if file.path.suffix == ".jsonl"]
    plain = [file for file in files if file.path.suffix != ".jsonl"]
    alone = len(files) == 1 and bool(plain)
    held_out = [] if alone else [file for file in plain if is_held_out(file.name, share)]
    if split != "all":
        excluded = set(held_out)
        plain = held_out if split == "test" else [file for file in plain if file not in excluded]
    known: set[str] = set()
    if split == "train":
        for file in held_out:
            for document in _documents(file, tidy):
                known |= telling_lines(document.text)
    for file in _within(plain, limit_bytes):
        for document in _documents(file, tidy):
            lines = telling_lines(document.text) if known else known
            if len(lines & known) <= NEAR_DUPLICATE * len(lines):
                yield document
    rest = None if limit_bytes is None else max(0, limit_bytes - sum(file.size for file in plain))
    if lined and rest != 0:
        yield from _streamed((d for file in lined for d in _documents(file, False)), split, share, rest)


def source_fingerprint(source: str) -> str:
    """A hash of what a source lists (names and sizes): a change of the source changes it."""
    if source.startswith("hf:"):
        return hashlib.blake2b(source.encode(), digest_size=8).hexdigest()
    listing = "\n".join(f"{file.name} {file.size}" for file in source_files(source))
    return hashlib.blake2b(listing.encode(), digest_size=8).hexdigest()
