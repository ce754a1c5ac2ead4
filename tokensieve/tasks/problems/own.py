"""A user's own domain: a file of rows, or an object of a module."""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokensieve.config import UserError
from tokensieve.importing import named_object
from tokensieve.tasks.contract import Answer, Task
from tokensieve.tasks.documents import Split
from tokensieve.tasks.problems.problem import Domain, Item
from tokensieve.tasks.problems.rows import FILES, Rows, key_of, text_of

DOMAIN, TASK = ("name", "languages", "difficulty", "draw", "grade"), ("name", "examples", "score", "reward")


def own(name: str, known: Iterable[str]) -> Domain:
    """The domain of FILE (JSONL, parquet, or a folder that `datasets` saved) or of `module:object`.

    The object is a `Domain` or a `Task`. UserError, which names the `known` domains, if there is none, and if it cannot
    be graded.
    """
    path = Path(name).expanduser()
    if path.exists():
        return Rows(path)
    module, colon, attribute = name.partition(":")
    if path.suffix in FILES or not colon:
        raise UserError(
            f"domain {name}: there is no such domain or file; name one of {', '.join(known)}, a file of rows, or "
            "module:object"
        )
    return _of_module(name, module, attribute)


@dataclass(frozen=True)
class TaskItem(Item):
    """An example of a user's task."""

    example: Any = None


class OfTask:
    """The domain of a `Task`, each of whose prompts is in one split, by a hash.

    Its examples have no demonstrations, so there are no worked examples of them and no cold start. Its `score` is what
    answers are graded by, in training too. UserError, when an item is drawn, for prompts that are not texts.
    """

    def __init__(self, task: Task[Any]):
        self.name, self._task = task.name, task
        self.languages, self.difficulty = ("en",), (1, 1, 1)

    def draw(self, rng: random.Random, difficulty: int, language: str, split: Split) -> TaskItem:
        found = self._task.examples(split, 1, None, rng.randrange(2**31))
        if not found:
            raise UserError(f"task {self.name} has no examples in its {split} split")
        (example,) = found
        text = text_of(example.prompt)
        if text is None or example.context:
            raise UserError(f"task {self.name}: example {example.name} has another prompt than one text; give one text")
        return TaskItem(key_of(text), text, "", "", (example.name,), example=example)

    def grade(self, item: Item, answer: str) -> float:
        assert isinstance(item, TaskItem)
        return self._task.score(item.example, Answer(answer)).value


def _of_module(name: str, module: str, attribute: str) -> Domain:
    found = named_object(f"domain {name}", module, attribute)
    if isinstance(found, type):
        raise UserError(f"domain {name}: {attribute} is a class; name an object of it")
    is_domain = all(hasattr(found, field) for field in DOMAIN)
    if not is_domain and not all(hasattr(found, field) for field in TASK):
        raise UserError(
            f"domain {name}: {attribute} is neither a Domain ({', '.join(DOMAIN)}) nor a Task ({', '.join(TASK)})"
        )
    if not re.fullmatch(r"[\w-]+", str(found.name)):
        raise UserError(
            f"domain {name}: its name is {found.name!r}, and folders have it; use letters, digits, _ and - alone"
        )
    return found if is_domain else OfTask(found)
