"""Does a model use its context? Needles by depth and length, what more context gains on real text, and whether it
still writes and talks.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from tokensieve.config import AcceptanceSizes
from tokensieve.evals.criteria import acceptance_criteria
from tokensieve.evals.text import Progress, check_room, evaluating, text_sequences, token_losses
from tokensieve.model import DecoderForCausalLM
from tokensieve.tasks import Document, chat, completion, retrieval

SCORED = 1024  # tokens at the end of a long sequence whose losses are compared
SPAN = 256  # of these, how many a short sequence scores: its context is `short` to `short + SPAN` tokens

FULL = AcceptanceSizes(
    contexts=(8192, 32768),
    needles=(1, 16),
    prompts_per_decile=100,
    long=8192,
    short=1024,
    sequences=64,
    completions=200,
    answers=48,
    new_tokens=160,
)
QUICK = AcceptanceSizes(
    contexts=(2048,),
    needles=(1, 16),
    prompts_per_decile=2,
    long=2048,
    short=512,
    sequences=4,
    completions=12,
    answers=6,
    new_tokens=96,
)


def needle_heat(
    model: DecoderForCausalLM,
    tokenizer: Any,
    documents: Sequence[Document],
    lengths: Iterable[int],
    count: int = 1,
    needles: int = 16,
    seed: int = 0,
    known: Mapping[int, retrieval.NeedleScore] | None = None,
    done: Progress | None = None,
) -> dict[str, Any]:
    """Needle accuracy by length and depth, `count` contexts of `needles` needles per length; lengths in `known` are
    not asked again.

    Returns {"lengths": tokens, ascending, "accuracy": one row of ten shares (None: no needle lay there) per length,
    "counts": questions}.
    """
    scores = dict(known or {})
    for length in lengths:
        if length in scores:
            continue
        contexts = retrieval.needle_contexts(tokenizer, documents, length, needles, count, seed)
        with evaluating(model):
            scores[length] = retrieval.evaluate(model, contexts)
        if done is not None:
            done()
    rows = sorted(scores)
    return {
        "lengths": rows,
        "accuracy": [list(scores[length].by_depth) for length in rows],
        "counts": [list(scores[length].counts) for length in rows],
    }


def needles_by_decile(
    model: DecoderForCausalLM,
    tokenizer: Any,
    documents: Sequence[Document],
    context: int,
    needles: int,
    prompts_per_decile: int,
    seed: int = 0,
    done: Progress | None = None,
) -> dict[str, Any]:
    """Accuracy in each tenth of the context, over at least `prompts_per_decile` questions there.

    One needle is placed in a chosen tenth of its own context; several are spread over all of it, and contexts are
    added until every tenth has its questions. Returns {"context", "needles", "accuracy", "by_depth", "counts"}.
    """
    records: list[retrieval.NeedleRecord] = []
    with evaluating(model):
        if needles == 1:
            for depth in range(10):
                drawn = retrieval.needle_contexts(tokenizer, documents, context, 1, prompts_per_decile, seed, depth)
                records += retrieval.evaluate(model, drawn).records
                if done is not None:
                    done()
        else:
            count = math.ceil(10 * prompts_per_decile / needles)
            while not records or min(retrieval.score(records).counts) < prompts_per_decile:
                drawn = retrieval.needle_contexts(tokenizer, documents, context, needles, count, seed)
                records += retrieval.evaluate(model, drawn).records
                count, seed = max(1, count // 10), seed + 1
                if done is not None:
                    done()
    total = retrieval.score(records)
    return {
        "context": context,
        "needles": needles,
        "accuracy": total.accuracy,
        "by_depth": list(total.by_depth),
        "counts": list(total.counts),
    }


def context_gain(model: DecoderForCausalLM, sequences: Sequence[Tensor], short: int = 1024) -> dict[str, Any]:
    """Loss of the same tokens, the last `SCORED` of each sequence, with the whole sequence before them and with about
    `short` tokens.

    A short sequence begins with bos like a long one and scores `SPAN` tokens, so it gives them `short` tokens of
    context or a little more. Returns {"long", "short": tokens; "loss_long", "loss_short", "gain": nats; "tokens": how
    many were scored}.
    """
    losses_long, losses_short = [], []
    for ids in sequences:
        scored = min(SCORED, len(ids) - short - 1)
        losses_long.append(token_losses(model, ids)[-scored:])
        for begin in range(len(ids) - scored, len(ids), SPAN):
            end = min(begin + SPAN, len(ids))
            clipped = torch.cat((ids[:1], ids[begin - short + 1 : end]))
            losses_short.append(token_losses(model, clipped)[begin - end :])
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
    documents: Iterable[Document],
    count: int,
    new_tokens: int = 160,
    seed: int = 0,
) -> dict[str, Any]:
    """Share of `count` held-out functions whose greedy completion parses: {"parsed", "count"}."""
    cases = list(completion.examples(documents))
    cases = random.Random(seed).sample(cases, min(count, len(cases)))
    with evaluating(model):
        score = completion.evaluate(model, tokenizer, cases, new_tokens)
    return {"parsed": score.parsed, "count": len(cases)}


def chat_answers(
    model: DecoderForCausalLM,
    tokenizer: Any,
    documents: Iterable[Document],
    count: int,
    new_tokens: int = 160,
    seed: int = 0,
) -> dict[str, Any]:
    """Greedy answers to `count` held-out prompts in chat format: {"ended", "good", "parsed": shares, "count"}."""
    prompts = list(chat.examples(documents))
    prompts = random.Random(seed).sample(prompts, min(count, len(prompts)))
    with evaluating(model):
        score = chat.evaluate(model, tokenizer, prompts, new_tokens)
    return {"ended": score.ended, "good": score.good, "parsed": score.parsed, "count": len(prompts)}


def acceptance(
    model: DecoderForCausalLM,
    tokenizer: Any,
    documents: Sequence[Document],
    sizes: AcceptanceSizes = FULL,
    done: Progress | None = None,
) -> dict[str, Any]:
    """Everything that a base model has to show, on held-out documents; `criteria.acceptance_criteria` judges it.

    Returns {"needles": [`needles_by_decile`, ...], "context_gain", "completions", "chat", "sizes", "criteria": {name:
    whether it holds}}.

    Raises:
        UserError: prompts past the model's positions.
    """
    check_room(model, max(*sizes.contexts, sizes.long))
    needles = [
        needles_by_decile(model, tokenizer, documents, context, count, sizes.prompts_per_decile, done=done)
        for context in sizes.contexts
        for count in sizes.needles
    ]
    sequences = text_sequences(tokenizer, documents, sizes.long, sizes.sequences)
    figures = {
        "needles": needles,
        "context_gain": context_gain(model, sequences, sizes.short),
        "completions": completions(model, tokenizer, documents, sizes.completions, sizes.new_tokens),
        "chat": chat_answers(model, tokenizer, documents, sizes.answers, sizes.new_tokens),
        "sizes": asdict(sizes),
    }
    return figures | {"criteria": {c.name: c.holds for c in acceptance_criteria(figures)}}
