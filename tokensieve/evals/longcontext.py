"""Does a model use its context? Needles by depth and length, what more context gains on real text, and whether it
still writes and talks.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tokensieve.config import AcceptanceSizes
from tokensieve.evals import intervals
from tokensieve.evals.criteria import acceptance_criteria
from tokensieve.evals.evaluation import Evaluation, by_context, evaluate
from tokensieve.evals.losses import text_sequences, token_losses
from tokensieve.evals.progress import OnProgress, part
from tokensieve.model import DecoderForCausalLM
from tokensieve.model.positions import check_positions
from tokensieve.tasks import Document, Documents, encoder
from tokensieve.tasks.completion import Completion
from tokensieve.tasks.dialogue import Chat
from tokensieve.tasks.retrieval import Needles

SCORED = 1024  # tokens at the end of a long sequence whose losses are compared
SPAN = 256  # of these, as many as one short sequence scores: its context is `short` to `short + SPAN` tokens
COMPLETED_TOGETHER = 16  # completions in a batch


@dataclass(frozen=True)
class Depths:
    """Needles by the tenth of the context in which they lay: the share found (None: none lay there), and the count."""

    by_depth: tuple[float | None, ...]
    counts: tuple[int, ...]


def depths(results: Iterable[tuple[float, float]]) -> Depths:
    """`results`: (depth, score) of every needle."""
    tenths: list[list[float]] = [[] for _ in range(10)]
    for depth, score in results:
        tenths[min(int(depth * 10), 9)].append(score)
    return Depths(tuple(sum(tenth) / len(tenth) if tenth else None for tenth in tenths), tuple(map(len, tenths)))


def needle_results(evaluation: Evaluation) -> list[tuple[float, float]]:
    """(depth, score) of every needle, without its long context."""
    return [(record.example.depth, record.score.value) for record in evaluation.records]


def _by_context(evaluation: Evaluation) -> list[list[tuple[float, float]]]:
    """The `needle_results` of each context."""
    results, groups = needle_results(evaluation), by_context([record.example for record in evaluation.records])
    return [[results[place] for place in places] for places in groups]


def _estimates(contexts: Sequence[Sequence[tuple[float, float]]]) -> list[dict[str, Any] | None]:
    """The share found in each tenth, as `Estimate`s over contexts; None: no needle lay there."""
    tenths: list[list[tuple[float, int]]] = [[] for _ in range(10)]
    for number, results in enumerate(contexts):
        for depth, score in results:
            tenths[min(int(depth * 10), 9)].append((score, number))
    return [intervals.clustered_share(*zip(*tenth, strict=True)).to_dict() if tenth else None for tenth in tenths]


def needle_heat(
    model: DecoderForCausalLM,
    tokenizer: Any,
    documents: Sequence[Document],
    lengths: Iterable[int],
    count: int = 1,
    needles: int = 16,
    seed: int = 0,
    known: Mapping[int, Evaluation] | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Needle accuracy by length and depth: `count` contexts of `needles` needles per length, in tokens.

    Lengths in `known` are not asked again. Returns {"lengths": tokens, ascending; "accuracy": one row of ten shares
    (None: no needle lay there) per length; "counts": questions}.
    """
    encode, scores = encoder(tokenizer), dict(known or {})
    task = Needles(encode, Documents(test=documents), needles)
    new = [length for length in dict.fromkeys(lengths) if length not in scores]
    for done, length in enumerate(new, 1):
        examples = task.examples("test", count * needles, length, seed)
        scores[length] = evaluate(model, encode, task, examples)
        if on_progress is not None:
            on_progress(f"needles in {length:,} tokens", done, len(new))
    rows = {length: depths(needle_results(scores[length])) for length in sorted(scores)}
    return {
        "lengths": list(rows),
        "accuracy": [list(row.by_depth) for row in rows.values()],
        "counts": [list(row.counts) for row in rows.values()],
    }


def needles_by_decile(
    model: DecoderForCausalLM,
    tokenizer: Any,
    documents: Sequence[Document],
    context: int,
    needles: int,
    prompts_per_decile: int,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Accuracy in each tenth of the context, over at least `prompts_per_decile` questions there.

    A single needle is placed in a chosen tenth of its own context. Several are spread over all of it, and contexts are
    added until every tenth has its questions. Returns {"context", "needles", "contexts": count, "accuracy", "by_depth",
    "counts", "estimates": `Estimate` of each tenth over the contexts}.
    """
    encode, test = encoder(tokenizer), Documents(test=documents)
    what = f"{needles} needles in {context:,} tokens" if needles > 1 else f"one needle in {context:,} tokens"
    results: list[list[tuple[float, float]]] = []  # of each context
    if needles == 1:
        for depth in range(10):
            task = Needles(encode, test, 1, depth=depth)
            examples = task.examples("test", prompts_per_decile, context, seed)
            callback = part(on_progress, what, depth * prompts_per_decile, 10 * prompts_per_decile)
            results += _by_context(evaluate(model, encode, task, examples, on_progress=callback))
    else:
        task = Needles(encode, test, needles)
        contexts = planned = math.ceil(10 * prompts_per_decile / needles)
        done = 0
        while not results or min(depths(chain(*results)).counts) < prompts_per_decile:
            examples = task.examples("test", contexts * needles, context, seed)
            callback = part(on_progress, what, done, max(planned, done + contexts))
            results += _by_context(evaluate(model, encode, task, examples, on_progress=callback))
            done, contexts, seed = done + contexts, max(1, contexts // 10), seed + 1
    every = [*chain(*results)]
    total = depths(every)
    return {
        "context": context,
        "needles": needles,
        "contexts": len(results),
        "accuracy": sum(score for _, score in every) / len(every),
        "by_depth": list(total.by_depth),
        "counts": list(total.counts),
        "estimates": _estimates(results),
    }


def context_gain(
    model: DecoderForCausalLM, sequences: Sequence[Tensor], short: int = 1024, begin: int = 1
) -> dict[str, Any]:
    """Loss of the same tokens, the last `SCORED` of each sequence, once with the whole sequence before them and once
    with about `short` tokens.

    A short sequence begins with the first `begin` tokens of the long one (its bos) and scores `SPAN` tokens, so it
    gives them `short` tokens of context or a little more. Returns {"long", "short": tokens; "loss_long", "loss_short",
    "gain": nats; "tokens": scored ones}.
    """
    losses_long, losses_short = [], []
    for ids in sequences:
        scored = min(SCORED, len(ids) - short - 1)
        losses_long.append(token_losses(model, ids)[-scored:])
        for first in range(len(ids) - scored, len(ids), SPAN):
            end = min(first + SPAN, len(ids))
            clipped = torch.cat((ids[:begin], ids[first - short + begin : end]))
            losses_short.append(token_losses(model, clipped)[first - end :])
    long, brief = torch.cat(losses_long), torch.cat(losses_short)
    return {
        "long": len(sequences[0]),
        "short": short,
        "loss_long": float(long.double().mean()),
        "loss_short": float(brief.double().mean()),
        "gain": float((brief - long).double().mean()),
        "tokens": long.numel(),
    }


def completions(
    model: DecoderForCausalLM,
    tokenizer: Any,
    documents: Sequence[Document],
    count: int,
    new_tokens: int = 160,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Share of `count` held-out functions whose greedy completion parses: {"parsed", "count"}."""
    encode = encoder(tokenizer)
    task = Completion(encode, Documents(test=documents))
    examples = task.examples("test", count, seed=seed)
    answers = evaluate(model, encode, task, examples, new_tokens, COMPLETED_TOGETHER, on_progress)
    return {"parsed": answers.value, "count": len(examples)}


def chat_answers(
    model: DecoderForCausalLM,
    tokenizer: Any,
    documents: Sequence[Document],
    count: int,
    new_tokens: int = 160,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Greedy answers to `count` prompts in chat format: {"ended", "good", "parsed": shares, "count"}.

    The functions asked about are held out; the small talk and sums between them are those of training.
    """
    task = Chat(Documents(test=documents), talk=True)
    examples = task.examples("test", count, seed=seed)
    answers = evaluate(model, tokenizer, task, examples, new_tokens, on_progress=on_progress)
    shares = {"ended": answers.part("ended"), "good": answers.value, "parsed": answers.part("parsed")}
    return {**shares, "count": len(examples)}


def acceptance(
    model: DecoderForCausalLM,
    tokenizer: Any,
    documents: Sequence[Document],
    sizes: AcceptanceSizes,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Everything that a base model has to show, on held-out documents; `criteria.acceptance_criteria` judges it.

    `on_progress` counts the units of each of its parts by themselves.

    Returns {"needles": [`needles_by_decile`, ...], "context_gain", "completions", "chat", "sizes", "criteria": {name:
    whether it holds}}; no "completions" and no "chat" if the sizes ask for none.

    Raises:
        UserError: prompts past the model's positions, or chat answers asked for and no chat format to ask in.
    """
    encode, longest = encoder(tokenizer), max(*sizes.contexts, sizes.long)
    limit, what = model.config.max_position_embeddings, f"prompts of {longest} tokens are"
    check_positions(limit, longest, what, "shorten them with --context")
    if sizes.answers:
        encode.chat()  # refuses at once, not after the needles
    needles = [
        needles_by_decile(model, encode, documents, context, count, sizes.prompts_per_decile, on_progress=on_progress)
        for context in sizes.contexts
        for count in sizes.needles
    ]
    sequences = text_sequences(encode, documents, sizes.long, sizes.sequences)
    tokens = sizes.new_tokens
    figures: dict[str, Any] = {
        "needles": needles,
        "context_gain": context_gain(model, sequences, sizes.short, len(encode.begin)),
    }
    if sizes.completions:
        figures["completions"] = completions(
            model, encode, documents, sizes.completions, tokens, on_progress=on_progress
        )
    if sizes.answers:
        figures["chat"] = chat_answers(model, encode, documents, sizes.answers, tokens, on_progress=on_progress)
    figures["sizes"] = asdict(sizes)
    return figures | {"criteria": {c.name: c.holds for c in acceptance_criteria(figures)}}
