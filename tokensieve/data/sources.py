"""The sources of text: the Python around us, a folder, a file, a glob, or a Hugging Face dataset.

Documents are split into training and held-out ones by a hash of their name (`tasks.documents`). For Python that is the
module's name, so a module stays held out under another Python version or prefix. Training text that mostly repeats
held-out text is dropped.
"""

import functools
import glob
import hashlib
import importlib.metadata
import json
import logging
import re
import site
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

from tokensieve.config import UserError
from tokensieve.data.formats import MIN_CHARS, LeftOut, SourceFile, documents_of, format_of, row_document
from tokensieve.files import missing_source
from tokensieve.tasks.documents import VENDORED, Document, Split, is_held_out, stable_fraction

SplitName = Split | Literal["all"]

log = logging.getLogger("tokensieve")

MAX_BYTES = 400_000  # of a Python module worth reading
NEAR_DUPLICATE = 0.5  # share of a file's lines that also occur in held-out files
PERMISSIVE_SPDX = frozenset(
    """MIT MIT-0 MIT-CMU HPND BSD-2-Clause BSD-3-Clause 0BSD Apache-2.0 ISC PSF-2.0 Python-2.0 Unlicense Zlib CC0-1.0
    BSL-1.0 CNRI-Python NCSA""".lower().split()
)
PERMISSIVE = re.compile(r"\b(MIT|0?BSD|Apache|ISC|ISCL|PSF|Python Software Foundation|Unlicense|Zlib|HPND|CC0)\b", re.I)
RESTRICTED = re.compile(r"GPL|General Public|MPL|Mozilla|propriet|commercial|EULA|NVIDIA|Other/|restrict", re.I)


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


def _listed(paths: Iterable[Path], root: Path, named: bool) -> list[SourceFile]:
    files = []
    datasets: dict[Path, set[str] | None] = {}
    for path in paths:
        parts = path.relative_to(root).parts
        if any(part.startswith(".") or part == "__pycache__" for part in parts) or not path.is_file():
            continue
        if path.parent not in datasets:
            datasets[path.parent] = _saved_dataset(path.parent)
        members = datasets[path.parent]
        if members is None or path.name in members:
            files.append(SourceFile(_module_name(parts), path, path.stat().st_size, format_of(path, named)))
    return files


def _saved_dataset(folder: Path) -> set[str] | None:
    """The data files of a folder that `datasets` wrote, without descriptions and caches; None for another folder.

    Raises:
        UserError: it holds several splits, or its description is damaged.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise UserError(f"{folder} is a dataset of several splits ({', '.join(splits)}); name one: {folder}/SPLIT")
    state = folder / "state.json"
    if not (folder / "dataset_info.json").is_file():
        return None
    if not state.is_file():  # as in the cache of `datasets`
        return {path.name for path in folder.glob("*.arrow") if not path.name.startswith("cache-")} or None
    try:
        return {entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{state} does not list the dataset's files ({error!r}); save the dataset again") from error


def split_field(source: str) -> tuple[str, str]:
    """(source, field of its rows): "rows.csv#body" -> ("rows.csv", "body"). Without #FIELD the field is empty."""
    if "#" not in source or Path(source).expanduser().exists():
        return source, ""
    path, _, field = source.rpartition("#")
    if not field:
        raise UserError(f"data source {source!r} names no field after the #; write SOURCE#FIELD")
    return path, field


def source_files(source: str) -> list[SourceFile]:
    """The files behind a source, sorted by name; UserError when there are none. Not for "hf:" sources."""
    name = split_field(source)[0]
    path = Path(name).expanduser()
    try:
        if name == "python":
            files: Sequence[SourceFile] = _python_files()
        elif path.is_dir():
            files = _listed(path.rglob("*"), path, named=False)
        elif path.is_file():
            files = [SourceFile(_module_name([path.name]), path, path.stat().st_size, format_of(path, named=True))]
        elif glob.has_magic(name):
            matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
            root = Path(*path.parts[: [glob.has_magic(part) for part in path.parts].index(True)])
            files = _listed(matches, root, named=format_of(path, named=True) == "json")
        else:
            raise missing_source(source)
    except OSError as error:
        raise UserError(f"data source {source!r} cannot be read ({error.strerror}); check its permissions") from error
    if not files:
        raise UserError(f"data source {source!r} holds no files; check the path or the pattern")
    return sorted(files, key=lambda file: (file.name, str(file.path)))


def _hugging_face(source: str, field: str, left_out: LeftOut) -> Iterator[Document]:
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
        where = f"data source {source!r} row {number + 1}"
        document = row_document(row, field, f"{name}:{number}", where, left_out)
        if document:
            yield document


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
    """The documents of one split of a source, in the order of their names. What is left out is logged at the end.

    Args:
        source: "python" (the standard library and the permissively licensed packages beside it), a folder, a file, a
            glob, or "hf:NAME[:config][:split]" (streamed). Each row of a .jsonl, .csv, .tsv, .parquet or .arrow file is
            a document: its "text", its "messages", or the field that "SOURCE#FIELD" names. Files may be compressed.
        split: "train", "test" (held out of training) or "all". A single text file is all training text.
        held_out_share: share of the documents held out, 0 to 1.
        limit_bytes: about how much to read; a sample of the files, or the first documents of a stream.

    Raises:
        UserError: the source is missing, unreadable or empty (nothing in this split counts as empty).
    """
    left_out = LeftOut()
    name, field = split_field(source)
    if name.startswith("hf:"):
        documents = _streamed(_hugging_face(name, field, left_out), split, held_out_share, limit_bytes)
    else:
        files = source_files(source)
        documents = _from_files(files, field, left_out, name == "python", split, held_out_share, limit_bytes)
    first = list(islice(documents, 1))
    if not first:
        raise UserError(_nothing(source, split, held_out_share, left_out))
    yield from first
    yield from documents
    if str(left_out) and name != "python":
        log.warning("data source %r: left out %s", source, left_out)


def _nothing(source: str, split: SplitName, share: float, left_out: LeftOut) -> str:
    if str(left_out):
        return f"data source {source!r} has no readable text: {left_out}; name another source"
    if split == "test":
        return (
            f"data source {source!r} has no readable text in its test split: its documents are too few for a "
            f"share of {share:g}; raise held_out_share (1 takes all of them)"
        )
    return f"data source {source!r} has no readable text in its {split} split; name a larger source"


def _streamed(
    documents: Iterable[Document], split: SplitName, share: float, limit_bytes: int | None
) -> Iterator[Document]:
    total = 0
    for document in documents:
        if split == "all" or is_held_out(document.name, share) == (split == "test"):
            yield document
            total += len(document.text.encode())
            if limit_bytes is not None and total >= limit_bytes:
                return


def _from_files(
    files: list[SourceFile],
    field: str,
    left_out: LeftOut,
    tidy: bool,
    split: SplitName,
    share: float,
    limit_bytes: int | None,
) -> Iterator[Document]:
    lined = [file for file in files if file.format != "text"]
    plain = [file for file in files if file.format == "text"]
    alone = len(files) == 1 and bool(plain)
    held_out = [] if alone else [file for file in plain if is_held_out(file.name, share)]
    if split != "all":
        excluded = set(held_out)
        plain = held_out if split == "test" else [file for file in plain if file not in excluded]
    known: set[str] = set()
    if split == "train":
        for file in held_out:
            for document in documents_of(file, field, LeftOut(), tidy):
                known |= telling_lines(document.text)
    for file in _within(plain, limit_bytes):
        for document in documents_of(file, field, left_out, tidy):
            lines = telling_lines(document.text) if known else known
            if len(lines & known) <= NEAR_DUPLICATE * len(lines):
                yield document
    rest = None if limit_bytes is None else max(0, limit_bytes - sum(file.size for file in plain))
    if lined and rest != 0:
        rows = (document for file in lined for document in documents_of(file, field, left_out))
        yield from _streamed(rows, split, share, rest)


def source_fingerprint(source: str) -> str:
    """A hash of what a source lists (names, sizes and formats): a change of the source changes it."""
    if source.startswith("hf:"):
        return hashlib.blake2b(source.encode(), digest_size=8).hexdigest()
    known = ("text", "jsonl")  # what was read before formats were listed keeps its fingerprint
    listing = "\n".join(
        f"{file.name} {file.size}" + ("" if file.format in known else f" {file.format}")
        for file in source_files(source)
    )
    return hashlib.blake2b(listing.encode(), digest_size=8).hexdigest()
