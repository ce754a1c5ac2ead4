"""What a domain is, and the task that makes prompts of its items: worked examples as earlier turns, then one question.

A prompt of post-training must be several times longer than k, or it says nothing of sparse attention. So it begins with
worked examples of the same kind, as many as fit into its length, each as a turn of the user and one of the assistant.
An agent's are whole episodes, calls and results included.
"""

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import Literal, Protocol, get_args, runtime_checkable

from tokensieve.config import UserError
from tokensieve.tasks.contract import Answer, Example, Score
from tokensieve.tasks.documents import Split, stable_fraction
from tokensieve.tasks.encoder import PlainEncoder
from tokensieve.tasks.problems.tools import Call, CallFault, Step, Tool, call_in, is_text, listing, response
from tokensieve.tasks.turns import CALL, END_THINK, THINK

Mode = Literal["think", "direct"]
MODES: tuple[Mode, ...] = get_args(Mode)
TRIES = 10_000  # draws until an item of the wanted split must have come

ASKS = {
    ("en", "think"): f"Solve the problems one by one. Think between {THINK} and {END_THINK}, then answer.",
    ("en", "direct"): "Solve the problems one by one. Answer at once, without thinking aloud.",
    ("zh", "think"): f"请逐一解答下列各题。先在 {THINK} 和 {END_THINK} 之间思考，然后作答。",
    ("zh", "direct"): "请逐一解答下列各题。直接作答，不要写出思考过程。",
}
LANGUAGES = ("en", "zh")  # in which prompts are worded


@dataclass(frozen=True)
class Item:
    """One question and a right answer. key: what is asked, however it is phrased; no key is in both splits.

    answer: empty if none is known. thoughts: a short derivation of it. data: what the domain grades by; empty if a
    judge alone can tell. rubric: the criteria of a judge, if the answer is one for a judge. steps: an agent's turns
    before the answer.
    """

    key: str
    question: str
    thoughts: str
    answer: str
    data: tuple[str, ...] = ()
    rubric: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()


class Domain(Protocol):
    """Questions of one kind, in one or several languages."""

    @property
    def name(self) -> str:
        """One word, which a dataset and a log have in a column."""

    @property
    def languages(self) -> tuple[str, ...]:
        """Of its questions and answers: ISO 639-1."""

    @property
    def difficulty(self) -> tuple[int, int, int]:
        """The least difficulty, the usual one, and the greatest, in the domain's own unit."""

    def draw(self, rng: random.Random, difficulty: int, language: str, split: Split) -> Item:
        """One item in a phrasing of the split, whichever split its key belongs to."""

    def grade(self, item: Item, answer: str) -> float:
        """How right an answer without its thoughts is, in [0, 1], by rules. Whatever the answer holds, nothing else.

        Post-training calls it in threads, several at once, so it may neither change shared state nor use signals such
        as `signal.alarm`, which only the main thread can.
        """


@runtime_checkable
class Agent(Domain, Protocol):
    """A domain whose answers may call tools, one at the end of each turn.

    It keeps no session: its state is a function of the item and of the calls so far, so that an episode can be graded
    from what the model wrote, anywhere and again.
    """

    @property
    def tools(self) -> tuple[Tool, ...]: ...

    @property
    def most_calls(self) -> int:
        """Calls of an episode, faulty ones included. An answer that calls once more has failed."""

    def respond(self, item: Item, calls: Sequence[Call]) -> str:
        """The result of the last call, after the others. CallFault if it cannot be done: its text is the result."""

    def grade(self, item: Item, answer: str, calls: Sequence[Call] = ()) -> float:
        """As in `Domain`, for an answer that comes after these calls. Those that cannot be done do nothing."""


@dataclass(frozen=True, kw_only=True)
class Problem(Example):
    """An item behind its worked examples. demonstration: a right answer in its mode, for cold-start training.

    steps: (turn, result) of an agent's turns before it.
    """

    domain: str
    mode: Mode
    language: str
    item: Item
    demonstration: str
    steps: tuple[tuple[str, str], ...] = ()

    @property
    def shown(self) -> Answer:
        """The demonstration as an answer."""
        return Answer(self.demonstration, earlier=tuple(turn for turn, _ in self.steps))


@dataclass(frozen=True)
class Problems:
    """The problems of a domain in one mode (a `Task`).

    Difficulty is the domain's. tokens: of a prompt, at least; its worked examples are of the same split, mode, language
    and difficulty, and none asks what the question asks. UserError for an unknown mode or language.
    """

    domain: Domain
    encode: PlainEncoder
    mode: Mode = "direct"
    language: str = "en"
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"mode {self.mode!r} is unknown; use one of {', '.join(MODES)}")
        if self.language not in self.domain.languages:
            known = ", ".join(self.domain.languages)
            raise UserError(f"{self.domain.name} has no problems in language {self.language!r}; use one of {known}")
        if self.language not in LANGUAGES:
            known = ", ".join(LANGUAGES)
            raise UserError(
                f"{self.domain.name}: no prompts are worded in language {self.language!r}; use one of {known}"
            )

    @property
    def name(self) -> str:
        return f"{self.domain.name}-{self.mode}"

    def examples(self, split: Split, count: int, difficulty: int | None = None, seed: int = 0) -> list[Problem]:
        """As in `Task`. UserError for a difficulty that the domain does not have."""
        least, usual, most = self.domain.difficulty
        size = usual if difficulty is None else difficulty
        if not least <= size <= most:
            raise UserError(f"{self.domain.name} has difficulties from {least} to {most}, not {size}")
        rng = random.Random(f"{self.name} {self.language} {split} {size} {seed}")
        return [self._problem(rng, size, split) for _ in range(count)]

    def _problem(self, rng: random.Random, size: int, split: Split) -> Problem:
        asked = self._item(rng, size, split)
        ask = ASKS[self.language, self.mode]
        if isinstance(self.domain, Agent):
            ask = f"{listing(self.domain.tools, self.domain.most_calls, self.language)}\n\n{ask}"
        shown: list[str] = []  # turns of user and assistant
        length, tries = len(self.encode(ask)) + len(self.encode(asked.question)), 0
        while length < self.tokens:
            item = self._item(rng, size, split)
            tries += 1
            if item.key != asked.key and item.answer:
                turns = self._worked(item)
                shown += turns
                length += sum(len(self.encode.solution(turn)) for turn in turns)
            elif not shown and tries > TRIES:
                raise UserError(
                    f"{self.domain.name} has no other answers in its {split} split to show as worked examples, "
                    f"which make prompts long; give some, or prompts of {self.tokens} tokens"
                )
        first, *others = [*shown, asked.question]
        texts = [f"{ask}\n\n{first}", *others]
        prompt = [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(texts)]
        return Problem(
            name=f"{self.domain.name} {asked.key}", prompt=prompt, domain=self.domain.name, mode=self.mode,
            language=self.language, item=asked, demonstration=self._turn(asked.thoughts, asked.answer),
            steps=self._steps(asked),
        )  # fmt: skip

    def _item(self, rng: random.Random, size: int, split: Split) -> Item:
        for _ in range(TRIES):
            item = self.domain.draw(rng, size, self.language, split)
            if split_of(self.domain.name, item.key) == split:
                if not all(map(is_text, (item.question, item.thoughts, item.answer))):
                    raise UserError(f"{self.domain.name} has a problem with half of a surrogate pair; leave it out")
                return item
        raise UserError(f"{self.domain.name} has too few problems of difficulty {size}; use a greater one")

    def _turn(self, thoughts: str, text: str) -> str:
        return f"{THINK}{thoughts}{END_THINK}{text}" if self.mode == "think" else text

    def _steps(self, item: Item) -> tuple[tuple[str, str], ...]:
        return tuple((self._turn(step.thoughts, str(step.call)), response(step.result)) for step in item.steps)

    def _worked(self, item: Item) -> list[str]:
        """The turns of a whole episode: the question, an agent's turns and the results of its tools, the answer."""
        steps = [text for step in self._steps(item) for text in step]
        return [item.question, *steps, self._turn(item.thoughts, item.answer)]

    def respond(self, example: Problem, turns: Sequence[str]) -> str | None:
        """The result of the call that the last of an agent's turns ends with, as the model reads it.

        None if the episode is over: the turn calls nothing, or once more than it may. A call that cannot be run has its
        fault as the result.
        """
        if not isinstance(self.domain, Agent) or len(turns) > self.domain.most_calls:
            return None
        try:
            if call_in(split_thinking(turns[-1])[1], self.domain.tools) is None:
                return None
            return response(self.domain.respond(example.item, calls_of(self.domain, turns)))
        except CallFault as fault:
            return response(str(fault))

    def score(self, example: Problem, answer: Answer) -> Score:
        """The domain's grade of an answer that ended and kept to its mode in every turn; else 0.

        Parts: "ended", and "format": each turn thinks if it should, and only then. UserError for a grade that is no
        number from 0 to 1.
        """
        kept, (_, text) = self.kept(example, answer), split_thinking(answer.text)
        value = self._grade(example.item, answer.earlier, text) if answer.ended and kept else 0.0
        if not (isinstance(value, Real) and 0 <= value <= 1):  # a NaN too
            raise UserError(f"{self.domain.name} grades an answer {value!r}; a grade is a number from 0 to 1")
        return Score(float(value), {"ended": float(answer.ended), "format": float(kept)})

    def kept(self, example: Problem, answer: Answer) -> bool:
        """Whether each turn of the answer thinks if it should, and only then."""
        turns = (split_thinking(text) for text in (*answer.earlier, answer.text))
        return all((thoughts is not None) == (example.mode == "think") for thoughts, _ in turns)

    def _grade(self, item: Item, earlier: Sequence[str], text: str) -> float:
        if not isinstance(self.domain, Agent):
            return self.domain.grade(item, text)
        if CALL in text:  # cut off before its result
            return 0.0
        return self.domain.grade(item, text, calls_of(self.domain, earlier))

    def reward(self, example: Problem, answer: Answer) -> float:
        """The score's value: nothing for an answer that does not end."""
        return self.score(example, answer).value


def calls_of(domain: Agent, turns: Sequence[str]) -> list[Call]:
    """The calls of an agent's turns, without those of no use."""
    calls: list[Call] = []
    for turn in turns:
        with suppress(CallFault):
            call = call_in(split_thinking(turn)[1], domain.tools)
            calls += [] if call is None else [call]
    return calls


def split_of(domain: str, key: str) -> Split:
    """The one split that asks this: half of all keys each, by a hash."""
    return "test" if stable_fraction(f"problem {domain} {key}") < 0.5 else "train"


def split_thinking(text: str) -> tuple[str | None, str]:
    """The thoughts of a text and the answer behind them; None if it does not think.

    Thoughts end at the first `</think>`, whether the prompt or the text itself opened them. Without an end everything
    behind `<think>` is thoughts, and the answer is empty: a model that never stops thinking has not answered.
    """
    before, end, after = text.partition(END_THINK)
    if end:
        return before.removeprefix(THINK).strip(), after.strip()
    head, start, thoughts = before.partition(THINK)
    return (thoughts.strip(), "") if start else (None, head.strip())
