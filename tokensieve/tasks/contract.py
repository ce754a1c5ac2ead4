"""The one contract of all tasks: what a task asks, how an answer is scored, and what it is rewarded with.

A task is any object with the three methods of `Task`. It need not know of models or trainers: evaluation reads prompts
and targets off its examples, and a trainer its rewards. A list of `Example`s is also all that a JSONL file or a data
set of questions has to become.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from tokensieve.tasks.documents import Split
from tokensieve.tasks.turns import Message

Prompt = (
    Sequence[int] | str | Sequence[Message]
)  # token ids, a text, or messages; `PlainEncoder.prompt` reads all three


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question. A task adds the fields that it scores by.

    name: where it comes from, the same on every machine.
    prompt: what the model reads before it answers.
    context: token ids that stand before the prompt (then token ids too). Neighbours that hold the same object share
        it.
    target: token ids of the only right answer, its end included; empty if there are several. One pass over them shows
        whether greedy decoding gives them, so nothing is generated.
    """

    name: str
    prompt: Prompt
    context: Sequence[int] = ()
    target: Sequence[int] = ()


@dataclass(frozen=True)
class Answer:
    """What a model wrote, without the end marker; `ended`: it wrote one, instead of running out of tokens.

    earlier: an agent's turns before this last one. Each ends with a call, and the tools' results are not among them.
    """

    text: str
    ended: bool = True
    earlier: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """`value` in [0, 1] is the figure that is averaged; `parts` are further shares in [0, 1], such as "ended".

    A part that does not apply to an example is left out of its score, and then of the part's mean.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


E = TypeVar("E", bound=Example)


class Task(Protocol[E]):
    """Questions of one kind, and how answers to them are judged."""

    @property
    def name(self) -> str:
        """One word for progress and errors."""

    def examples(self, split: Split, count: int, difficulty: int | None = None, seed: int = 0) -> Sequence[E]:
        """`count` examples, the same for the same arguments; fewer if there are no more.

        Args:
            split: "train" or "test". The two share no document and nothing that is asked for, but for the small talk
                of a `Chat` with `talk`, which a model knows from training alone.
            difficulty: at most so hard, in the task's own unit, which its docstring names; None: the task's own.

        Raises:
            UserError: no examples of this split, or of this difficulty.
        """

    def score(self, example: E, answer: Answer) -> Score:
        """How good the answer is, for figures: strict, and comparable between models."""

    def reward(self, example: E, answer: Answer) -> float:
        """What reinforcement learning gives for the answer, in [0, 1]."""
