"""How a model is asked the examples of any task."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from tokensieve.config import UserError
from tokensieve.evals.progress import OnProgress
from tokensieve.model import ForwardOptions, LatentCache, Objective, with_options
from tokensieve.tasks import Answer, Example, PlainEncoder, Score, Task, encoder

PREFILL_CHUNK = 32768  # tokens: a first chunk runs on fused kernels, and attention's memory is linear in it
TOGETHER = 65536  # cached tokens, over all the copies of a context whose questions go through the model together
LOGITS = 4096  # positions whose logits are held at a time, over all rows; one row may have more


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Within the block: evaluation mode, no indexer objective, no gradients. For a model in the middle of training."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), with_options(model, ForwardOptions(objective=Objective())):
            yield
    finally:
        model.train(training)


@dataclass(frozen=True)
class Record:
    example: Any  # of the task's own kind
    answer: Answer
    score: Score


@dataclass(frozen=True)
class Evaluation:
    """What a model answered, in the order of the examples."""

    records: tuple[Record, ...]

    @property
    def value(self) -> float:
        """The mean score."""
        return sum(record.score.value for record in self.records) / len(self.records)

    def part(self, name: str) -> float | None:
        """The mean of a part over the examples whose scores have it; None if none has."""
        shares = [record.score.parts[name] for record in self.records if name in record.score.parts]
        return sum(shares) / len(shares) if shares else None


def by_context(examples: Sequence[Example]) -> list[list[int]]:
    """The places of the examples that have a target or a context, one list for each stretch of them that shares a
    context; all of a stretch have a target, or none.
    """
    read = [place for place, example in enumerate(examples) if example.target or example.context]
    kinds = groupby(read, key=lambda place: (id(examples[place].context), bool(examples[place].target)))
    return [list(places) for _, places in kinds]


def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task[Any],
    examples: Sequence[Example],
    max_new_tokens: int = 256,
    batch_size: int = 1,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Greedy answers to all examples, scored by the task.

    An example with a target costs no decoding: greedy decoding gives the target exactly if, with the target fed in, the
    best token at each of its positions is the target's. So its answer is the best token at each position. Neighbours
    that share a context read it once and go through the model together, as rows after its one cache.

    All other answers are generated, `batch_size` at a time from the shortest prompt to the longest. The rows of a batch
    are padded on the left and masked. Each reads its own context (`Answering` reads a shared one once).

    Args:
        tokenizer: the model's, or an encoder.
        max_new_tokens: of a generated answer.
        on_progress: told after each context and each batch.

    Raises:
        UserError: no examples; messages, and the tokenizer has no chat format; a target after an empty prompt.
    """
    if not examples:
        raise UserError(f"no examples of {task.name} to score; ask for at least one")
    encode = encoder(tokenizer)
    shared = [places for places in by_context(examples) if examples[places[0]].target]
    prompts = {
        place: [*example.context, *encode.prompt(example.prompt)]
        for place, example in enumerate(examples)
        if not example.target
    }
    order = sorted(prompts, key=lambda place: len(prompts[place]))
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    answers: dict[int, Answer] = {}
    with evaluating(model), torch.inference_mode():
        for done, places in enumerate([*shared, *batches], 1):
            if done <= len(shared):
                batch = _after_context(model, encode, [examples[place] for place in places])
            else:
                batch = _generate(model, encode, [prompts[place] for place in places], max_new_tokens)
            answers.update(zip(places, batch, strict=True))
            if on_progress is not None:
                on_progress(task.name, done, len(shared) + len(batches))
    pairs = [(example, answers[place]) for place, example in enumerate(examples)]
    return Evaluation(tuple(Record(example, answer, task.score(example, answer)) for example, answer in pairs))


def _after_context(model: Any, encode: PlainEncoder, examples: Sequence[Example]) -> list[Answer]:
    """Answers to examples that have targets and share their context, which is read once."""
    context = list(examples[0].context)
    prompts = [encode.prompt(example.prompt) for example in examples]
    for prompt, example in zip(prompts, examples, strict=True):
        if not prompt:
            raise UserError(f"{example.name} has a target and an empty prompt; begin it with the context's last token")
    cache = LatentCache()
    ids = torch.tensor([context], device=next(model.parameters()).device)
    for begin in range(0, ids.shape[1], PREFILL_CHUNK):
        model(ids[:, begin : begin + PREFILL_CHUNK], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return _check_targets(model, encode, cache, prompts, examples)


def repeated(cache: LatentCache, rows: int) -> LatentCache:
    """A cache with so many rows, all of them the one row of `cache`, which stays as it is."""
    repeated = copy(cache)  # its buffers are made anew for the rows
    repeated.batch_repeat_interleave(rows)
    return repeated


def _check_targets(
    model: Any, encode: PlainEncoder, cache: LatentCache, prompts: Sequence[list[int]], examples: Sequence[Example]
) -> list[Answer]:
    """What greedy decoding gives after the cached context, as far as the target."""
    asked = [(prompt, list(example.target)) for prompt, example in zip(prompts, examples, strict=True)]
    longest = max(len(examples[0].context), *(len(prompt) + len(target) for prompt, target in asked))
    answers: list[Answer] = []
    while len(answers) < len(asked):
        rows = asked[len(answers) : len(answers) + max(1, TOGETHER // longest)]
        while len(rows) > 1 and len(rows) * _judged(rows) > LOGITS:
            rows = rows[: len(rows) // 2]
        for (_, target), best in zip(rows, _best_tokens(model, cache, rows), strict=True):
            answers.append(answer_of(encode, best[:-1], ended=best[-1] == target[-1]))
    return answers


def _judged(rows: Sequence[tuple[list[int], list[int]]]) -> int:
    """The columns of (prompt, target) rows, filled up at the end, from the first that gives a target's token on."""
    return max(len(prompt) + len(target) for prompt, target in rows) - min(len(prompt) for prompt, _ in rows)


def _best_tokens(model: Any, cache: LatentCache, asked: Sequence[tuple[list[int], list[int]]]) -> list[list[int]]:
    """The best token at each position of each target; every (prompt, target) is a row after the one cached context."""
    rows = repeated(cache, len(asked))
    turns = [[*prompt, *target[:-1]] for prompt, target in asked]
    # Shorter rows are filled up at the end, which nothing before it sees.
    width, kept = max(map(len, turns)), _judged(asked)
    ids = torch.tensor(
        [turn + turn[-1:] * (width - len(turn)) for turn in turns], device=next(model.parameters()).device
    )
    best = model(ids, past_key_values=rows, use_cache=True, logits_to_keep=kept).logits.argmax(-1).tolist()
    ends = [len(turn) - width + kept for turn in turns]
    return [row[end - len(target) : end] for (_, target), end, row in zip(asked, ends, best, strict=True)]


def _generate(model: Any, encode: PlainEncoder, prompts: Sequence[list[int]], max_new_tokens: int) -> list[Answer]:
    """Greedy answers to the prompts, which go through the model together."""
    device = next(model.parameters()).device
    width, pad = max(map(len, prompts)), 0 if encode.pad is None else encode.pad
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    output = model.generate(
        ids,
        attention_mask=mask if len(prompts) > 1 else None,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=encode.ends or None,
        pad_token_id=pad,
    )
    answers = []
    for row in output[:, width:].tolist():
        end = next((place for place, token in enumerate(row) if token in encode.ends), None)
        answers.append(answer_of(encode, row[:end], ended=end is not None))
    return answers


def answer_of(encode: PlainEncoder, ids: list[int], ended: bool) -> Answer:
    """The answer in `ids`, which do not hold the token that ended it, but may hold what closes an answer before it."""
    before = list(encode.turns.close[:-1])
    if ended and before and ids[-len(before) :] == before:
        ids = ids[: -len(before)]
    return Answer(encode.decode(ids), ended)
