"""Needles: facts hidden in real text, asked for at its end.

A training sequence is one document of exactly `context` tokens, here with DeepSeek's markers:

    bos <User> text with n needle lines "\\n\\n" question <Assistant></think> key: value eos  <User> question ... eos

Other tokenizers put what their chat template says around the turns, and those without one put line ends (`Turns`).

An evaluation context is everything up to the end of the text. Each of its questions is the first turn right after the
context, with its answer begun ("key: "); the questions of a context share it. `phrasing` says what is held out.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokensieve.config import UserError
from tokensieve.tasks.contract import Answer, Example, Score
from tokensieve.tasks.documents import Document, Documents, Split
from tokensieve.tasks.encoder import PlainEncoder, encoder
from tokensieve.tasks.phrasing import NOUNS, Key, answer, draw_keys, draw_value, mention, part, question, statement

MAX_NEEDLES = 16


@dataclass(frozen=True)
class Needle:
    key: Key
    noun: str
    value: str
    line: str


@dataclass(frozen=True, kw_only=True)
class NeedleExample(Example):
    """One question for one needle.

    `context` is the text up to where the questions begin, `prompt` goes on to the key that begins the answer, and
    `target` is the value and what ends an answer: what only the context can tell.

    `depth` in [0, 1): where the needle's line begins, as a share of the context's tokens.
    """

    depth: float
    key: str
    value: str


def draw_needles(rng: random.Random, count: int, held_out: bool) -> list[Needle]:
    """`count` needles with different keys and values."""
    needles: list[Needle] = []
    values: set[str] = set()
    for key in draw_keys(rng, count, held_out):
        value = draw_value(rng, held_out)
        while any(value in other or other in value for other in values):
            value = draw_value(rng, held_out)
        values.add(value)
        noun = part(rng, NOUNS, held_out, 2)
        needles.append(Needle(key, noun, value, statement(rng, key, noun, value, held_out)))
    return needles


NEWLINES = ("Ċ", "\n", "<0x0A>")  # as byte-level tokens, plain ones and those of a byte fallback spell it


class LineBounds:
    """The places where a line may be spliced into tokens: after a token that ends a line and before one that does not.

    whole: no token reaches past the end of a line. GPT-2's do, over the next line's indentation; no line may be spliced
        in there.
    """

    def __init__(self, encode: PlainEncoder):
        tokens = [encode.raw.id_to_token(i) or "" for i in range(encode.vocab_size)]
        self.ends = np.array([token.endswith(NEWLINES) for token in tokens])
        self.starts = np.array([token.startswith(NEWLINES) for token in tokens])
        self.whole = not any(newline in token for newline in NEWLINES for token in np.array(tokens)[~self.ends])

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Positions p in [1, len) at which tokens[p] is the first of a line."""
        return np.flatnonzero(self.ends[tokens[:-1]] & ~self.starts[tokens[1:]]) + 1


def _splice(
    text: np.ndarray, lines: Sequence[list[int]], positions: Sequence[int]
) -> tuple[list[np.ndarray], list[int]]:
    """Inserts lines[i] before text[positions[i]]; returns the pieces and where each line begins in the whole."""
    order = sorted(range(len(lines)), key=lambda i: positions[i])
    pieces, begins, last, length = [], [0] * len(lines), 0, 0
    for i in order:
        piece = text[last : positions[i]]
        begins[i] = length + len(piece)
        pieces += [piece, np.asarray(lines[i], dtype=text.dtype)]
        length = begins[i] + len(lines[i])
        last = positions[i]
    pieces.append(text[last:])
    return pieces, begins


def needle_count(rng: random.Random) -> int:
    """1 to 16, uniform in the logarithm, and 16 in four draws of ten."""
    return MAX_NEEDLES if rng.random() < 0.4 else round(math.exp(rng.uniform(0, math.log(MAX_NEEDLES))))


def training_sequence(
    rng: random.Random,
    encode: PlainEncoder,
    bounds: LineBounds,
    take_text: Callable[[random.Random, int], np.ndarray],
    context: int,
) -> tuple[np.ndarray, np.ndarray]:
    """One sequence of exactly `context` tokens (int64), and where its answers' values stand (bool).

    `take_text(rng, n)` gives n tokens of real text.
    """
    around = encode.turns
    needles = draw_needles(rng, needle_count(rng), held_out=False)
    asked = rng.sample(needles, len(needles) if rng.random() < 0.7 else rng.randint(1, len(needles)))
    lines: list[list[int]] = []
    turns: list[tuple[list[int], list[int]]] = []  # up to the value, and from it on
    budget = context // 2 - len(around.open)
    for needle in asked:
        line = encode(needle.line)
        words = question(rng, needle.key, needle.noun, held_out=False)
        begun, value = _answer(encode, needle)
        head = [*around.next, *encode(words)] if turns else encode("\n\n" + words)
        turn = [*head, *around.reply, *begun]
        budget -= len(line) + len(turn) + len(value)
        if budget < 0:
            break
        lines.append(line)
        turns.append((turn, value))
    if not turns:
        raise UserError(f"a context of {context} tokens is too short for a needle; use at least 256")
    unasked = [needle.line for needle in needles if needle not in asked]
    mentions = [mention(rng, needle.key, needle.noun) for needle in needles if rng.random() < 0.1]
    for extra in unasked + mentions:
        line = encode(extra)
        if budget >= len(line):
            budget -= len(line)
            lines.append(line)
    tail = [token for turn, value in turns for token in (*turn, *value)]
    length = context - len(around.open) - sum(map(len, lines)) - len(tail)
    text = take_text(rng, length)
    starts = bounds(text)
    positions = [int(starts[rng.randrange(len(starts))]) if len(starts) else 0 for _ in lines]
    pieces, _ = _splice(text, lines, positions)
    ids = np.concatenate([np.array(around.open), *pieces, np.array(tail)]).astype(np.int64)
    answers = np.zeros(context, dtype=bool)
    in_value = [is_value for turn, value in turns for is_value in [False] * len(turn) + [True] * len(value)]
    answers[context - len(tail) :] = in_value
    return ids, answers


def _answer(encode: PlainEncoder, needle: Needle) -> tuple[list[int], list[int]]:
    """The tokens of the answer up to the value, and those of the value and of the answer's end."""
    whole = encode(answer(needle.key, needle.value))
    count = len(encode(needle.value))
    while needle.value not in encode.decode(whole[len(whole) - count :]):  # a token also holds what stands before it
        count += 1
    return whole[:-count], [*whole[-count:], *encode.turns.close]


@dataclass(frozen=True)
class Needles:
    """Needles in real text (a `Task`), whose phrasings, keys and values of the test split training never sees.

    Examples come in whole contexts, each with `needles` needles and one question a needle. Difficulty: tokens of a
    context, into which any one of its questions with its answer fits.

    tokenizer: or an encoder.
    documents: joined in their order until a context is full.
    context: the difficulty unless one is given.
    depth: a tenth of the context, 0 to 9, in which the needles lie; None spreads them over all of it.
    """

    tokenizer: Any
    documents: Documents
    needles: int = MAX_NEEDLES
    context: int = 2048
    depth: int | None = None
    name: str = "needles"

    def examples(self, split: Split, count: int, difficulty: int | None = None, seed: int = 0) -> list[NeedleExample]:
        """At least `count` questions, of as many contexts as that takes.

        Raises:
            UserError: the documents are too short, or the context is too small for the needles.
        """
        encode, context = encoder(self.tokenizer), self.context if difficulty is None else difficulty
        bounds, filler = LineBounds(encode), Filler(encode, self.documents.of(split), split, seed)
        examples = []
        for number in range(math.ceil(count / self.needles)):
            held_out = split == "test"
            rng = random.Random(f"needles {seed} {number} {context} {self.needles} {self.depth} {held_out}")
            examples += self._of_one_context(encode, bounds, filler, rng, context, held_out)
        return examples

    def _of_one_context(
        self,
        encode: PlainEncoder,
        bounds: LineBounds,
        filler: "Filler",
        rng: random.Random,
        context: int,
        held_out: bool,
    ) -> list[NeedleExample]:
        drawn = draw_needles(rng, self.needles, held_out)
        asked = [_asked(rng, encode, needle, held_out) for needle in drawn]
        lines = [encode(needle.line) for needle in drawn]
        before = len(encode.turns.open)
        longest = max(len(prompt) + len(target) for prompt, target in asked)
        length = context - before - sum(map(len, lines)) - longest
        if length < 64:
            raise UserError(f"{self.needles} needles do not fit in a context of {context} tokens; use a longer context")
        text = filler.take(length, without=[needle.value for needle in drawn])
        starts = bounds(text)
        if len(starts) and bounds.whole:  # the last line is not a whole one
            text, starts = text[: starts[-1]], starts[:-1]
        if not len(starts):
            raise UserError(f"{filler.documents} have no lines to put needles between; use another source")
        depths = (starts + before) / (before + len(text) + sum(map(len, lines)))
        places = [int(starts[i]) for i in _spread(rng, depths, self.needles, self.depth)]
        pieces, begins = _splice(text, lines, places)
        ids = (*encode.turns.open, *np.concatenate(pieces).tolist())
        return [
            NeedleExample(
                name=f"{needle.key.render()} at {begin + before} of {len(ids)}",
                prompt=prompt,
                context=ids,
                target=target,
                depth=(begin + before) / len(ids),
                key=needle.key.render(),
                value=needle.value,
            )
            for needle, (prompt, target), begin in zip(drawn, asked, begins, strict=True)
        ]

    def score(self, example: NeedleExample, answer: Answer) -> Score:
        """1 if the answer goes on with the value and ends there, else 0."""
        return Score(float(answer.ended and answer.text.strip() == example.value))

    def reward(self, example: NeedleExample, answer: Answer) -> float:
        """1 if the answer names the value, and no other number but those of the key, else 0."""
        numbers = set(re.findall(r"\d+", answer.text)) - set(re.findall(r"\d+", example.key))
        return float(numbers == {example.value})


def _asked(rng: random.Random, encode: PlainEncoder, needle: Needle, held_out: bool) -> tuple[list[int], list[int]]:
    """A needle's question with its answer begun, and what is to follow."""
    words = encode("\n\n" + question(rng, needle.key, needle.noun, held_out))
    begun, value = _answer(encode, needle)
    return [*words, *encode.turns.reply, *begun], value


class Filler:
    """The text between needles: whole documents in turn, so that one context goes on where the last one ended."""

    def __init__(self, encode: PlainEncoder, documents: Sequence[Document], split: Split, seed: int):
        self.documents = "the held-out documents" if split == "test" else "the training documents"
        if not documents:
            what = self.documents.removeprefix("the ")
            raise UserError(f"no {what} to hide needles in; raise held_out_share or name a larger source")
        self.encode, self.texts, self.encoded = encode, [d.text for d in documents], dict[int, np.ndarray]()
        self.cursor = random.Random(f"first document {seed}").randrange(len(self.texts))

    def take(self, length: int, without: Sequence[str]) -> np.ndarray:
        """`length` tokens of documents that hold none of the values `without`."""
        chunks: list[np.ndarray] = []
        filled = 0
        for tried in range(1000 * len(self.texts)):
            if filled >= length:
                self.cursor += tried
                return np.concatenate(chunks)[:length]
            which = (self.cursor + tried) % len(self.texts)
            if not any(value in self.texts[which] for value in without):
                if which not in self.encoded:
                    self.encoded[which] = np.array(self.encode(self.texts[which].rstrip("\n") + "\n\n\n"))
                chunks.append(self.encoded[which])
                filled += len(self.encoded[which])
        raise UserError(f"{self.documents} are too short for one context; name a larger source")


def _spread(rng: random.Random, depths: np.ndarray, needles: int, tenth: int | None) -> list[int]:
    """The lines (numbers) before which the needles go: one in each `needles`th of the depths, or all in one tenth."""
    chosen = []
    for slot in rng.sample(range(needles), needles):
        share = (tenth + rng.random()) / 10 if tenth is not None else (slot + rng.random()) / needles
        distance = np.abs(depths - share)
        if tenth is not None:
            distance = distance + (np.floor(depths * 10) != tenth)
        chosen.append(int(distance.argmin()))
    return chosen
