"""Language consistency: how much of a text is in the language of its prompt."""

import re
from collections.abc import Sequence
from typing import Any

from tokensieve.config import UserError

# What has no language: code, mathematics, links, markers, and what stands between backticks.
_NO_PROSE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.{0,2000}?\\\]|https?://\S+|<[^<>\n]*>", re.DOTALL
)
_SENTENCE = re.compile(r"[^.!?。！？\n]+")
_LETTER = re.compile(r"[^\W\d_]")
LEAST = 4  # letters of a sentence whose language is asked for; below, py3langid guesses


class LanguageShare:
    """The share of a text's letters that stand in sentences of its prompt's language.

    `languages`: ISO 639-1 codes, among which each sentence is decided. The fewer there are, the surer it is.
    UserError for an unknown code, and without py3langid.
    """

    def __init__(self, languages: Sequence[str] = ("en", "zh")):
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError as error:
            raise UserError(
                "language consistency needs py3langid; install it with: pip install 'tokensieve[rl]'"
            ) from error
        self.languages = tuple(languages)
        self._identifier: Any = LanguageIdentifier.from_model_file(MODEL_FILE)
        try:
            self._identifier.set_languages(self.languages)
        except ValueError as error:
            raise UserError(
                f"languages {', '.join(languages)}: {error}; use ISO 639-1 codes, such as en or zh"
            ) from error

    def __call__(self, text: str, language: str) -> float:
        """As `of_prose`, and 1 for a text without prose: nothing in it is in another language."""
        found = self.of_prose(text, language)
        return 1.0 if found is None else found

    def of_prose(self, text: str, language: str) -> float | None:
        """In [0, 1]. None for a text without prose, such as a number or a program.

        UserError for a language that is not among `languages`.
        """
        if language not in self.languages:
            raise UserError(f"language {language!r} is not among {', '.join(self.languages)}; add it")
        total = inside = 0
        for sentence in _SENTENCE.findall(_NO_PROSE.sub("\n", text)):
            letters = len(_LETTER.findall(sentence))
            if letters >= LEAST:
                total += letters
                inside += letters if self._identifier.classify(sentence)[0] == language else 0
        return inside / total if total else None
