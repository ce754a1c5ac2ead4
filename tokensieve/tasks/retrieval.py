"""Needles: facts hidden in real text, asked for at its end.

A training sequence is one document of exactly `context` tokens:

    bos <User> text with n needle lines "\\n\\n" question <Assistant></think> key: value eos  <User> question ... eos

An evaluation context is everything up to the end of the text. Each of its questions is the first turn right after the
context: they go through the model together, as rows that all begin with the one cached context, and each with its
answer begun ("key: "). What is held out is described in `phrasing`.
"""

import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tokensieve.config import UserError
from tokensieve.tasks import Document, PlainEncoder
from tokensieve.tasks.phrasing import NOUNS, Key, answer, draw_keys, draw_value, mention, part, question, statement

MAX_NEEDLES = 16
PREFILL_CHUNK = 32768  # tokens: a first chunk runs on fused kernels, and attention's memory is linear in it
TOGETHER = 65536  # cached tokens, over all the copies of a context whose questions go through the model together


@dataclass(frozen=True)
class Needle:
    key: Key
    noun: str
    value: str
    line: str


@dataclass(frozen=True)
class NeedleQuestion:
    """`question_ids` run from the blank line after the text over </think> to the key that begins the answer, as with a prefix
    completion; `answer_ids` are the value and eos: what only the context can tell.

    `depth` in [0, 1): where the needle's line begins, as a share of the context's tokens.
    """

    question_ids: list[int]
    answer_ids: list[int]
    depth: float
    key: str
    value: str


@dataclass(frozen=True)
class NeedleContext:
    context_ids: list[int]
    questions: list[NeedleQuestion]


@dataclass(frozen=True)
class NeedleRecord:
    context: int
    key: str
    depth: float
    expected: str
    answered: str
    correct: bool


@dataclass(frozen=True)
class NeedleScore:
    """`accuracy`: share of questions whose every answer token, eos included, is the greedy choice.

    `by_depth`: the same per tenth of the context, None where no needle lay; `counts`: questions per tenth.
    """

    accuracy: float
    by_depth: tuple[float | None, ...]
    counts: tuple[int, ...]
    records: tuple[NeedleRecord, ...] = field(repr=False)


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


class LineBounds:
    """Where a line may be spliced into tokens: after a token that ends a line and before one that does not."""

    def __init__(self, encode: PlainEncoder):
        tokens = [encode.raw.id_to_token(i) or "" for i in range(encode.vocab_size)]
        self.ends = np.array([token.endswith(("Ċ", "\n", "<0x0A>")) for token in tokens])
        self.starts = np.array([token.startswith(("Ċ", "\n", "<0x0A>")) for token in tokens])

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
    marks = encode.markers
    needles = draw_needles(rng, needle_count(rng), held_out=False)
    asked = rng.sample(needles, len(needles) if rng.random() < 0.7 else rng.randint(1, len(needles)))
    lines: list[list[int]] = []
    turns: list[list[int]] = []
    budget = context // 2 - 2
    for needle in asked:
        line = encode(needle.line)
        words = question(rng, needle.key, needle.noun, held_out=False)
        head = [marks.user, *encode(words)] if turns else encode("\n\n" + words)
        turn = [*head, marks.assistant, marks.end_think, *encode(answer(needle.key, needle.value)), marks.eos]
        budget -= len(line) + len(turn)
        if budget < 0:
            break
        lines.append(line)
        turns.append(turn)
    if not turns:
        raise UserError(f"a context of {context} tokens is too short for a needle; use at least 256")
    unasked = [needle.line for needle in needles if needle not in asked]
    mentions = [mention(rng, needle.key, needle.noun) for needle in needles if rng.random() < 0.1]
    for extra in unasked + mentions:
        line = encode(extra)
        if budget >= len(line):
            budget -= len(line)
            lines.append(line)
    length = context - 2 - sum(map(len, lines)) - sum(map(len, turns))
    text = take_text(rng, length)
    starts = bounds(text)
    positions = [int(starts[rng.randrange(len(starts))]) if len(starts) else 0 for _ in lines]
    pieces, _ = _splice(text, lines, positions)
    tail = [token for turn in turns for token in turn]
    ids = np.concatenate([np.array([marks.bos, marks.user]), *pieces, np.array(tail)]).astype(np.int64)
    answers = np.zeros(context, dtype=bool)
    end = context - len(tail)
    for turn, needle in zip(turns, asked, strict=False):
        end += len(turn)
        answers[end - 1 - len(encode(needle.value)) : end] = True
    return ids, answers


def needle_contexts(
    tokenizer: Any,
    documents: Iterable[Document],
    context: int,
    needles: int = MAX_NEEDLES,
    count: int = 1,
    seed: int = 0,
    depth: int | None = None,
    held_out: bool = True,
) -> list[NeedleContext]:
    """`count` evaluation contexts, each with `needles` needles and one question a needle.

    Args:
        documents: held-out documents; joined in their order until a context is full.
        context: tokens; context_ids and any one question with its answer fit in it.
        depth: a tenth of the context, 0 to 9, in which the needles lie; None spreads them over all of it.
        held_out: phrasings, keys and values that training never sees.

    Raises:
        UserError: the documents are too short, or the context is too small for the needles.
    """
    encode = tokenizer if isinstance(tokenizer, PlainEncoder) else PlainEncoder(tokenizer)
    bounds, filler = LineBounds(encode), Filler(encode, [document.text for document in documents], seed)
    contexts = []
    for number in range(count):
        rng = random.Random(f"needles {seed} {number} {context} {needles} {depth} {held_out}")
        drawn = draw_needles(rng, needles, held_out)
        asked = [_asked(rng, encode, needle, held_out) for needle in drawn]
        lines = [encode(needle.line) for needle in drawn]
        longest = max(len(tail) + len(answer) for tail, answer in asked)
        length = context - 2 - sum(map(len, lines)) - longest
        if length < 64:
            raise UserError(f"{needles} needles do not fit in a context of {context} tokens; use a longer context")
        text = filler.take(length, without=[needle.value for needle in drawn])
        starts = bounds(text)
        if len(starts):  # the last line is not a whole one
            text, starts = text[: starts[-1]], starts[:-1]
        if not len(starts):
            raise UserError("the held-out documents have no lines to put needles between; use another source")
        depths = (starts + 2) / (2 + len(text) + sum(map(len, lines)))
        pieces, begins = _splice(text, lines, [int(starts[i]) for i in _spread(rng, depths, needles, depth)])
        ids = [encode.markers.bos, encode.markers.user, *np.concatenate(pieces).tolist()]
        questions = [
            NeedleQuestion(tail, answer, (begin + 2) / len(ids), needle.key.render(), needle.value)
            for needle, (tail, answer), begin in zip(drawn, asked, begins, strict=True)
        ]
        contexts.append(NeedleContext(ids, questions))
    return contexts


def _asked(rng: random.Random, encode: PlainEncoder, needle: Needle, held_out: bool) -> tuple[list[int], list[int]]:
    """A needle's question with its answer begun, and what is to follow."""
    marks = encode.markers
    tail = [*encode("\n\n" + question(rng, needle.key, needle.noun, held_out)), marks.assistant, marks.end_think]
    whole = encode(answer(needle.key, needle.value))
    value = len(encode(needle.value))  # digits are tokens of their own, so the value is the answer's last tokens
    return tail + whole[:-value], [*whole[-value:], marks.eos]


class Filler:
    """The held-out text between needles: whole documents in turn, so that one context goes on where the last one ended."""

    def __init__(self, encode: PlainEncoder, texts: list[str], seed: int):
        if not texts:
            raise UserError("no held-out documents to hide needles in; raise held_out_share or name a larger source")
        self.encode, self.texts, self.encoded = encode, texts, dict[int, np.ndarray]()
        self.cursor = random.Random(f"first document {seed}").randrange(len(texts))

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
        raise UserError("the held-out documents are too short for one context; name a larger source")


def _spread(rng: random.Random, depths: np.ndarray, needles: int, tenth: int | None) -> list[int]:
    """Which of the lines that begin at `depths` the needles come before: one in each `needles`th, or all in one tenth."""
    chosen = []
    for slot in rng.sample(range(needles), needles):
        share = (tenth + rng.random()) / 10 if tenth is not None else (slot + rng.random()) / needles
        distance = np.abs(depths - share)
        if tenth is not None:
            distance = distance + (np.floor(depths * 10) != tenth)
        chosen.append(int(distance.argmin()))
    return chosen


def evaluate(
    model: Any,
    contexts: Sequence[NeedleContext],
    on_context: Callable[[int, int], None] | None = None,
    decode: Callable[[list[int]], str] | None = None,
) -> NeedleScore:
    """Asks every question of every context; the context is read once and stays cached for all its questions.

    Greedy decoding gives the answer exactly when, with the answer fed in, the best token at each of its positions is
    the answer's; so a question costs one short pass, and several that share a context go through one together.
    `on_context(done, total)` reports progress; `decode` spells the records' answers (token ids otherwise).
    """
    import torch

    from tokensieve.model import LatentCache

    spell = decode or (lambda ids: " ".join(map(str, ids)))
    device = next(model.parameters()).device
    records = []
    with torch.inference_mode():
        for number, item in enumerate(contexts):
            cache = LatentCache()
            ids = torch.tensor([item.context_ids], device=device)
            for begin in range(0, ids.shape[1], PREFILL_CHUNK):
                chunk = ids[:, begin : begin + PREFILL_CHUNK]
                model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
            together = max(1, TOGETHER // len(item.context_ids))
            for first in range(0, len(item.questions), together):
                asked = item.questions[first : first + together]
                for ask, best in zip(asked, _answers(model, cache, asked), strict=True):
                    right = best == ask.answer_ids
                    records.append(NeedleRecord(number, ask.key, ask.depth, ask.value, spell(best), right))
            if on_context is not None:
                on_context(number + 1, len(contexts))
    return score(records)


def _answers(model: Any, cache: Any, asked: Sequence[NeedleQuestion]) -> list[list[int]]:
    """The best token at each position of each answer; every question is a row after the one cached context."""
    import torch

    rows = copy(cache)  # its buffers are made anew for the rows
    rows.batch_repeat_interleave(len(asked))
    turns = [ask.question_ids + ask.answer_ids[:-1] for ask in asked]
    # Shorter rows are filled up at the end, which nothing before it sees.
    width = max(map(len, turns))
    ids = torch.tensor(
        [turn + turn[-1:] * (width - len(turn)) for turn in turns], device=next(model.parameters()).device
    )
    best = model(ids, past_key_values=rows, use_cache=True).logits.argmax(-1).tolist()
    return [row[len(turn) - len(ask.answer_ids) : len(turn)] for ask, turn, row in zip(asked, turns, best, strict=True)]


def score(records: Sequence[NeedleRecord]) -> NeedleScore:
    """Sums up records; raises UserError when there are none."""
    if not records:
        raise UserError("no needle questions to score; ask for at least one context")
    tenths: list[list[bool]] = [[] for _ in range(10)]
    for record in records:
        tenths[min(int(record.depth * 10), 9)].append(record.correct)
    return NeedleScore(
        accuracy=sum(record.correct for record in records) / len(records),
        by_depth=tuple(sum(tenth) / len(tenth) if tenth else None for tenth in tenths),
        counts=tuple(map(len, tenths)),
        records=tuple(records),
    )


def reward(completion: str, answer: str) -> float:
    """1 when the completion names the answer and no other number, else 0."""
    numbers = set(re.findall(r"\d+", completion))
    return float(numbers == {answer})
