"""Questions whose answers are known: a line hidden in real text, at a depth and in a length that are chosen.

Lengths are in the endpoint's own tokens. Its tokenizer is not known, so characters are counted, and each reply's
`prompt_tokens` corrects how many of them make a token.
"""

import importlib.resources
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokensieve.tasks.words import ADJECTIVES, THINGS

LINE = 28  # tokens of a hidden line, at most
REST = 60  # tokens of a text's beginning, and of the question


@dataclass(frozen=True)
class Question:
    """A text with hidden codes, the key that is asked for, and its code."""

    text: str
    key: str
    code: str

    @property
    def message(self) -> str:
        """For a chat."""
        return f"{self.text}\n\nWhat is the access code of {self.key}?"

    @property
    def beginning(self) -> str:
        """For a completion."""
        return f"{self.message}\nAnswer: The access code of {self.key} is"

    def is_answered_by(self, text: str) -> bool:
        """Whether the first number of this length in the text is the code."""
        digits = "".join(c if c.isdigit() else " " for c in text.replace(",", "")).split()
        return next((number for number in digits if len(number) >= len(self.code)), None) == self.code


def _source_text() -> str:
    path = importlib.resources.files("tokensieve") / "bundled" / "texts.jsonl"
    return "\n".join(json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines())


@dataclass
class Writer:
    """Writes texts of a wanted number of tokens. No two begin alike, so no cache knows a new one's beginning."""

    rng: random.Random
    characters: float = 3.0  # in a token, corrected by `learn`
    source: str = field(default_factory=_source_text)

    def learn(self, text: str, tokens: int) -> None:
        """Corrects the characters of a token by a text that was counted."""
        self.characters = len(text) / tokens

    def plain(self, tokens: int) -> str:
        """A text without a question, which ends behind a word: what follows is not part of the word's last token."""
        text = self._begin() + self._cut(int(tokens * self.characters) - self.rng.randrange(20, 60))
        return text[: max(text.rfind(" "), 1)].rstrip()

    def questions(self, tokens: int, depths: Sequence[float]) -> list[Question]:
        """Questions that share a text of about `tokens` tokens, each for one of its hidden lines.

        depths: ascending, in [0, 1]; where the lines begin, as shares of the text.
        """
        keys = self.rng.sample([f"{a}-{b}" for a in ADJECTIVES for b in THINGS], len(depths))
        codes = [str(self.rng.randrange(100_000, 1_000_000)) for _ in keys]
        lines = [f"# Note: the access code of {key} is {code}.\n" for key, code in zip(keys, codes, strict=True)]
        room, whole = round(tokens * self.characters) - 120, sum(map(len, lines))
        source, text, taken = self._cut(room - whole), self._begin(), 0
        for line, depth in zip(lines, depths, strict=True):
            at = source.rfind("\n", 0, max(taken, taken + round(room * depth) - len(text)) + 1) + 1
            text, taken = text + source[taken:at] + line, max(taken, at)
        text = (text + source[taken:]).rstrip("\n")
        return [Question(text, key, code) for key, code in zip(keys, codes, strict=True)]

    def _begin(self) -> str:
        return f"# Run {self.rng.getrandbits(48):012x}\n"

    def _cut(self, characters: int) -> str:
        """So many characters of the source, which begins anew if it is too short."""
        times = -(-max(characters, 0) // len(self.source))
        return (self.source * times)[: max(characters, 0)]
