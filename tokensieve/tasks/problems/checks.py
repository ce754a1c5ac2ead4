"""Criteria of a rubric that a rule can check: their texts, and what they say of an answer.

A text is all that a rubric holds, so that a language model and the scripted judge read the same one.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokensieve.config import UserError

_SENTENCE = re.compile(r"[^.!?。！？]*[.!?。！？]+")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def sentences(text: str) -> list[str]:
    """The sentences of a text: each ends with its marks, what follows the last mark is one too."""
    ended = _SENTENCE.findall(text)
    rest = _SENTENCE.sub("", text).strip()
    return [s.strip() for s in [*ended, rest] if _WORD.search(s)]


def words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def states(text: str, value: str) -> bool:
    """Whether a value stands in a text by itself, not within another word or number; in Chinese, anywhere."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])", text, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Check:
    """One kind of criterion. text: with {0} for what varies. met: whether an answer meets it, for this value."""

    text: str
    met: Callable[[str, str], bool]

    def criterion(self, value: object) -> str:
        return self.text.format(value)

    @property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.text).replace(re.escape("{0}"), "(.+)"))


CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "sentences": Check("The answer has exactly {0} sentences.", lambda a, n: len(sentences(a)) == int(n)),
        "most words": Check("The answer has at most {0} words.", lambda a, n: 0 < len(words(a)) <= int(n)),
        "least words": Check("The answer has at least {0} words.", lambda a, n: len(words(a)) >= int(n)),
        "names": Check('The answer uses the word "{0}".', lambda a, word: word.lower() in words(a)),
        "avoids": Check('The answer never uses the word "{0}".', lambda a, word: word.lower() not in words(a)),
        "begins": Check('The answer begins with the word "{0}".', lambda a, word: words(a)[:1] == [word.lower()]),
        "states": Check('The answer states "{0}".', lambda a, value: states(a, value)),
        "omits": Check('The answer does not state "{0}".', lambda a, value: not states(a, value)),
        "most characters": Check("The answer has at most {0} characters.", lambda a, n: 0 < len(a.strip()) <= int(n)),
        "ends": Check('The answer ends with "{0}".', lambda a, mark: a.rstrip().endswith(mark)),
    }
)


def met(criterion: str, answer: str) -> bool:
    """Whether an answer meets a criterion in one of the texts of `CHECKS`. An answer without a word
    meets none.

    UserError for another text: no rule can judge it.
    """
    for check in CHECKS.values():
        found = check.pattern.fullmatch(criterion)
        if found is not None:
            return bool(words(answer)) and check.met(answer, found[1])
    raise UserError(f"no rule checks the criterion {criterion!r}; a language model has to judge it")


def is_checked(criterion: str) -> bool:
    """Whether a rule can say if an answer meets a criterion."""
    try:
        met(criterion, "a word")
    except (UserError, ValueError):  # another text, or one of ours with a word in the place of its number
        return False
    return True
