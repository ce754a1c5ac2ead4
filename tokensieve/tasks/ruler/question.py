"""What RULER's tasks share: questions after a long context, answers that are begun, and the share found of what is
expected. Source: Hsieh et al., RULER, arXiv 2404.06654. All texts and generators here are our own.
"""

import random
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

from tokensieve.config import UserError
from tokensieve.tasks.contract import Answer, Example, Score
from tokensieve.tasks.documents import Documents, Split
from tokensieve.tasks.encoder import PlainEncoder, encoder
from tokensieve.tasks.ruler.haystack import FILLER, Haystack, fitted, of_documents, without

NO_DOCUMENTS = Documents()
SLACK = 16  # tokens that an answer may have beyond those that are expected


@dataclass(frozen=True, kw_only=True)
class LongExample(Example):
    """One question about a long context.

    `context` is everything up to the question, `prompt` the question and the answer's beginning.

    expected: strings, all of which the answer shall hold. form: what such strings look like, a regular expression.
    depth in [0, 1): where the line that is asked for begins, as a share of the context's tokens; None if several are.
    length: tokens of context and prompt. room: tokens that the answer may have.
    """

    expected: tuple[str, ...]
    form: str
    depth: float | None
    length: int
    room: int


@dataclass(frozen=True)
class Question:
    """text: what is asked. begun: the answer's first words. line: the hidden line that is asked for, if it is one."""

    text: str
    begun: str
    expected: tuple[str, ...]
    line: str | None = None


@dataclass(frozen=True)
class Puzzle:
    """A context and its questions. build(n): the context's text, the longer the larger n."""

    build: Callable[[int], str]
    questions: Sequence[Question]


@dataclass(frozen=True, kw_only=True)
class LongTask(ABC):
    """Questions about contexts of a chosen length (a `Task`).

    Examples of one context stand together and share it: their errors are not independent, so an interval is to be
    taken over contexts (`intervals.clustered_share`). Contexts are drawn independently, but for the documents around
    what is hidden. No string that is hidden or asked for is in both splits; the phrasing is, since nobody trains on it
    here.

    An answer is generated, after its beginning: models say the same in many ways, so there is no one target.
    With a chat template the context is the user's turn and the answer's beginning the assistant's; without one they
    follow each other as plain text.

    Difficulty: tokens of context, prompt and room for the answer. A prompt is never longer, and shorter by no more than
    the tokens of one piece of text (`haystack.PIECE` characters), or of one word and its repetitions.

    tokenizer: or an encoder.
    documents: of the haystack "documents".
    context: the difficulty unless one is given.
    """

    tokenizer: Any
    documents: Documents = NO_DOCUMENTS
    context: int = 4096
    haystack: Haystack = "documents"
    depth: int | None = None
    name: str = "long"

    @property
    @abstractmethod
    def form(self) -> str:
        """A regular expression: what the strings that are asked for look like in lower case."""

    @abstractmethod
    def puzzle(self, rng: random.Random, split: Split) -> Puzzle:
        """One context's text and questions. UserError: knobs that do not go together."""

    def examples(self, split: Split, count: int, difficulty: int | None = None, seed: int = 0) -> list[LongExample]:
        """`count` questions, of as many contexts as that takes.

        Raises:
            UserError: the context is too short for what it shall hold, knobs that do not go together, or no documents.
        """
        if not isinstance(self.tokenizer, PlainEncoder):  # made once, for all contexts
            return replace(self, tokenizer=encoder(self.tokenizer)).examples(split, count, difficulty, seed)
        encode, length = self.tokenizer, self.context if difficulty is None else difficulty
        examples: list[LongExample] = []
        number = 0
        while len(examples) < count:
            rng = random.Random(f"{self._knobs} {split} {length} {seed} {number}")
            examples += self._of_one_context(encode, self.puzzle(rng, split), length, number)
            number += 1
        return examples[:count]

    @property
    def _knobs(self) -> str:
        mine = {name: value for name, value in vars(self).items() if name not in ("tokenizer", "documents", "context")}
        return f"{type(self).__name__} {sorted(mine.items())}"

    def _of_one_context(self, encode: PlainEncoder, puzzle: Puzzle, length: int, number: int) -> list[LongExample]:
        turns = encode.turns
        prompts = [[*encode("\n\n" + q.text), *turns.reply, *encode(q.begun)] for q in puzzle.questions]
        rooms = [len(encode(" " + ", ".join(q.expected))) + SLACK for q in puzzle.questions]
        after = max(len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True))
        text = fitted(encode, puzzle.build, length - len(turns.open) - after)
        if text is None:
            raise UserError(
                f"{self.name}: what is hidden and its question do not fit in {length} tokens; use a longer context, or "
                "hide less"
            )
        encoding = encode.raw.encode(text, add_special_tokens=False)
        ends = [end for _, end in encoding.offsets]
        context = (*turns.open, *encoding.ids)

        def depth(line: str | None) -> float | None:
            if line is None:
                return None
            return (len(turns.open) + bisect_right(ends, text.index(line))) / len(context)

        return [
            LongExample(
                name=f"{self.name} {number}: {question.text}",
                context=context,
                prompt=prompt,
                expected=question.expected,
                form=self.form,
                depth=depth(question.line),
                length=len(context) + len(prompt),
                room=room,
            )
            for question, prompt, room in zip(puzzle.questions, prompts, rooms, strict=True)
        ]

    def source(
        self, rng: random.Random, split: Split, secrets: Sequence[str], more: Callable[[], str]
    ) -> Iterator[str]:
        """Pieces of the haystack that hold none of the secrets. `more()`: one more line of the task's own form."""
        if self.haystack == "filler":
            return without(cycle(FILLER), secrets)
        if self.haystack == "pairs":
            return without(iter(lambda: more() + "\n", None), secrets)
        what = "held-out" if split == "test" else "training"
        return without(of_documents(rng, self.documents.of(split), what), secrets)

    def score(self, example: LongExample, answer: Answer) -> Score:
        """The share of the expected strings that the answer holds, in whatever case: RULER's score.

        Part "all", if several are expected: whether it holds all of them.
        """
        text = answer.text.lower()
        held = [expected.lower() in text for expected in example.expected]
        parts = {"all": float(all(held))} if len(held) > 1 else {}
        return Score(sum(held) / len(held), parts)

    def reward(self, example: LongExample, answer: Answer) -> float:
        """The expected strings named, over all strings of their form that are expected or named.

        So it does not pay to list everything.
        """
        named = set(re.findall(example.form, answer.text.lower()))
        expected = {text.lower() for text in example.expected}
        return len(named & expected) / len(named | expected)
