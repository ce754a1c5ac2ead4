"""A domain whose prompts are the rows of a file: JSONL, parquet, or a folder that `datasets` saved.

A row has these fields, and any others, which are not read:

    prompt (or question): a text.
    answer: a text, a number, or a list of right ones. The first is shown in worked examples and demonstrations.
    rubric: a list of criteria. If there is one, it is what the answer is judged by, and `answer` is only shown.
    thoughts: a derivation of the answer, for the mode that thinks. language: en (the default) or zh.
    difficulty: a whole number from 1 (the default) on.
"""

import bisect
import hashlib
import json
import math
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokensieve.config import UserError
from tokensieve.tasks.documents import Split
from tokensieve.tasks.problems.checks import is_checked, met
from tokensieve.tasks.problems.expressions import Expressions, final, is_expression, is_symbolic
from tokensieve.tasks.problems.problem import LANGUAGES, Item, split_of
from tokensieve.tasks.problems.tools import is_text

FILES = (".jsonl", ".ndjson", ".parquet")


class Rows:
    """The rows of a file (a `Domain`), in which each prompt is in one split, by a hash.

    Rows are drawn with replacement. Difficulty: that of the rows, at most; the least one is the first at which every
    language has rows in both splits. An answer is right if its end is one of the row's answers: as a value, if that is
    mathematics (`Expressions`), else as a text, whatever its case, spaces and punctuation; signs such as ! and ' count
    in an answer without a word. Rows with a rubric are graded by the share of criteria that rules find met, if rules
    can check each of them (`checks`); otherwise by a judge alone. UserError for a row of another form, and for a
    language without rows in one of the splits. digest: of all that is read of the rows.
    """

    def __init__(self, path: Path):
        self.name = re.sub(r"\W+", "-", path.stem).strip("-") or "rows"
        items = [_item(row, f"{path} row {number}") for number, row in enumerate(_rows(path), 1)]
        if not items:
            raise UserError(f"{path} has no rows; give rows with a prompt and an answer or a rubric")
        self.digest = hashlib.blake2b(repr(items).encode("utf-8", "replace"), digest_size=8).hexdigest()
        self.languages = tuple(sorted({language for _, language, _ in items}))
        self._items: dict[tuple[str, Split], list[tuple[int, Item]]] = {}
        for level, language, item in sorted(items, key=lambda x: x[0]):
            self._items.setdefault((language, split_of(self.name, item.key)), []).append((level, item))
        for language in self.languages:
            for split in ("train", "test"):
                if (language, split) not in self._items:
                    count = sum(x[1] == language for x in items)
                    raise UserError(
                        f"{path} has {count} rows in language {language}, and none is in the {split} split, which a "
                        "hash of the prompt decides; give more rows"
                    )
        least = max(rows[0][0] for rows in self._items.values())
        levels = sorted({level for level, _, _ in items if level >= least})
        self.difficulty = least, levels[len(levels) // 2], levels[-1]
        mathematical = any(is_expression(right) for _, _, item in items if not item.rubric for right in item.data)
        self._expressions = Expressions() if mathematical else None

    def draw(self, rng: random.Random, difficulty: int, language: str, split: Split) -> Item:
        items = self._items[language, split]
        return items[rng.randrange(bisect.bisect_right(items, difficulty, key=lambda x: x[0]))][1]

    def grade(self, item: Item, answer: str) -> float:
        if item.rubric and not item.data:
            raise UserError(
                f"{self.name}: no rule checks the rubric {item.rubric[0]!r}; a language model has to judge it"
            )
        if item.rubric:
            return sum(met(criterion, answer) for criterion in item.data) / len(item.data)
        return float(any(self._right(answer, right) for right in item.data))

    def _right(self, answer: str, right: str) -> bool:
        plain = _plain(answer, right)
        if plain and plain == _plain(right, right):
            return True
        return is_expression(right) and self._expressions is not None and self._expressions.equal(answer, right)


def text_of(prompt: Any) -> str | None:
    """The text of a prompt: a text itself, or the only message; None for anything else, and for a blank one."""
    if isinstance(prompt, list | tuple) and len(prompt) == 1 and isinstance(prompt[0], Mapping):
        prompt = prompt[0].get("content")
    return prompt.strip() or None if isinstance(prompt, str) else None


def key_of(prompt: str) -> str:
    return hashlib.blake2b(" ".join(prompt.lower().split()).encode("utf-8", "replace"), digest_size=8).hexdigest()


def _rows(path: Path) -> Iterator[Any]:
    if path.is_dir():
        yield from _saved(path)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix in FILES:
        yield from _lines(path)
    else:
        raise UserError(f"{path}: a domain's file is {', '.join(FILES)}, or a folder that datasets.save_to_disk wrote")


def _lines(path: Path) -> Iterator[Any]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parsed(line, f"{path} line {number}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({getattr(error, 'msg', error)}); repair or remove it") from error


def _parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} needs the package pyarrow; pip install pyarrow") from error
    try:
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged or cannot be read ({error}); write it again") from error


def _saved(path: Path) -> Iterator[Any]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path} needs the package datasets; install it with: pip install 'tokensieve[rl]'") from error
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is no folder that datasets.save_to_disk wrote; give such a folder, or a file"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        raise UserError(f"{path} is a dataset of several splits ({', '.join(found)}); name one: {path}/SPLIT")
    yield from found


def _item(row: Any, where: str) -> tuple[int, str, Item]:
    """(difficulty, language, item). UserError for a row of another form."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is not an object with fields; give a prompt and an answer or a rubric")
    prompt = text_of(row.get("prompt") if row.get("prompt") is not None else row.get("question"))
    if prompt is None:
        raise UserError(f'{where} has no prompt; give it a "prompt" that is a text')
    answers, rubric = _answers(row.get("answer"), where), _rubric(row.get("rubric"), where)
    if not answers and not rubric:
        raise UserError(f'{where} has nothing to grade by; give it an "answer" or a "rubric"')
    language, level = row.get("language") or "en", row.get("difficulty")
    if language not in LANGUAGES:
        raise UserError(f"{where}: language {language!r} is unknown; use one of {', '.join(LANGUAGES)}")
    level = 1 if level is None else level
    if isinstance(level, bool) or not isinstance(level, int) or level < 1:
        raise UserError(f"{where}: difficulty is {level!r}; it is a whole number from 1 on")
    thoughts = row.get("thoughts") or ""
    if not isinstance(thoughts, str):
        raise UserError(f"{where}: thoughts are no text")
    if not all(map(is_text, (prompt, thoughts, *answers, *rubric))):
        raise UserError(f"{where} holds half of a surrogate pair, which is no character; write its texts again")
    data = tuple(rubric) if rubric and all(map(is_checked, rubric)) else () if rubric else answers
    return level, language, Item(key_of(prompt), prompt, thoughts, answers[0] if answers else "", data, rubric)


def _answers(value: Any, where: str) -> tuple[str, ...]:
    given = value if isinstance(value, list) else [] if value is None else [value]
    for answer in given:
        if isinstance(answer, float) and not math.isfinite(answer):
            raise UserError(
                f"{where}: an answer is {answer}, as tables write one that is missing; give a finite number or a text"
            )
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise UserError(f"{where}: an answer is {type(answer).__name__}; give a text, a number, or a list of them")
    return tuple(text for text in (str(answer).strip() for answer in given) if text)


def _rubric(value: Any, where: str) -> tuple[str, ...]:
    given = [] if value is None else value
    if not isinstance(given, list) or not all(isinstance(x, str) and x.strip() for x in given):
        raise UserError(f"{where}: a rubric is a list of criteria, each of them a text")
    return tuple(given)


def _plain(answer: str, right: str) -> str:
    """The end of an answer, to be compared with that of `right`: without spaces and the punctuation around it.

    Symbols keep whatever could be mathematics: 5! and f' are not 5 and f. Words lose their case too.
    """
    text = " ".join(final(answer).split())
    if not is_symbolic(right):
        return text.casefold().strip(" .,;:!?。，！？*_`\"'$")
    text = text.strip(" *_`$").rstrip(" .,;:?。，？*_`$")
    return text if is_expression(right) else text.casefold()
