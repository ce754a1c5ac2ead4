"""Suites of `tokensieve eval --suite`: long contexts by task, length and depth; short prompts; every figure with its
interval, and every arm beside the first one, on the same prompts and texts.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from tokensieve.config import LongSizes, ShortSizes, UserError
from tokensieve.evals import intervals
from tokensieve.evals.answers import answering
from tokensieve.evals.choices import choose
from tokensieve.evals.evaluation import Evaluation, by_context, evaluating
from tokensieve.evals.finished import Finished
from tokensieve.evals.longcontext import depths
from tokensieve.evals.losses import Perplexity, documents_of, perplexity, text_sequences
from tokensieve.evals.paired import digest, ratio_of, share_of, texts_digest
from tokensieve.evals.parity import Arm
from tokensieve.evals.progress import OnProgress, part
from tokensieve.evals.trial import try_selection
from tokensieve.model import DecoderForCausalLM, selecting
from tokensieve.model.positions import check_positions
from tokensieve.tasks import Document, Documents, encoder
from tokensieve.tasks.ruler import LongExample, LongTask, long_tasks
from tokensieve.tasks.short import MAKES, Choices

OnFigures = Callable[[dict[str, Any]], None]

CONTROLS = {"sparse": "indexer", "window": "window", "sinks": "sinks"}


def long_arms(
    model: DecoderForCausalLM, top_k: Sequence[int] = (), selections: Mapping[str, str] | None = None
) -> dict[str, Arm]:
    """Arms of one model: it attending to every key, and if it is sparse, for each k its indexer's choice, the last k
    keys (window) and the first 4 with the last k - 4 (sinks); `selections`: further ones, {name: selection}.

    Raises:
        UserError: several k or selections for a dense model, an unknown selection, or k that is too few for sinks.
    """
    arms = {"dense": Arm(model, "dense")}
    for name in {*(selections or {})} & {"dense", *CONTROLS}:
        raise UserError(f"an arm cannot be called {name}, which is one of the suite's own; rename it")
    if not model.is_sparse:
        if top_k or selections:
            raise UserError("a dense model selects nothing: leave out long.top_k and --arm, or sparsify it first")
        return arms
    for k in top_k or (model.top_k,):
        if k < 5:
            raise UserError(f"long.top_k: {k} keys are too few for the arm sinks; use 5 or more")
        for name, selection in (CONTROLS | dict(selections or {})).items():
            with selecting(model, selection):  # an unknown one is refused now rather than after the other arms
                pass
            arms[f"{name} k={k}"] = Arm(model, selection, k)
    return arms


def checked_tasks(tokenizer: Any, documents: Sequence[Document], sizes: LongSizes) -> list[LongTask]:
    """The tasks of the suite "long". What cannot be asked is refused now rather than after the first arms.

    Raises:
        UserError: nothing asked for, or sizes that do not go together.
    """
    if not sizes.contexts or sizes.prompts < 1 or (sizes.other_prompts is not None and sizes.other_prompts < 1):
        raise UserError("long.contexts and long.prompts: ask at least one question in at least one context")
    tasks = long_tasks(encoder(tokenizer), Documents(test=documents), sizes)
    for task in tasks:
        task.examples("test", 1, min(sizes.contexts))
    return tasks


def judge_long(
    arms: Mapping[str, Arm],
    tokenizer: Any,
    documents: Sequence[Document],
    sizes: LongSizes,
    on_progress: OnProgress | None = None,
    judged: Container[str] | None = None,
    on_figures: OnFigures | None = None,
    finished: Finished | None = None,
) -> dict[str, Any]:
    """RULER's kinds of tasks, and perplexity by position, of every arm on the same held-out prompts and texts.

    An arm is not asked where its k keys are all there are: prompts of at most k tokens. Scores and differences have
    intervals over contexts, whose questions may err together. Answers are those of an engine (`Answering`).

    tokenizer: the arms', of transformers. judged: arms that are asked all prompts, the others being asked the first
    `sizes.other_prompts`; None: all arms. on_figures: called after every arm with the figures so far, in the form of
    the result, so that a caller can keep what a broken run has measured. finished: what was measured before, which is
    not measured again.

    Returns {"tasks": [{"task", "context", "arm", "score": `Estimate`, "contexts": count, "shortest": tokens of the
    shortest prompt, "difference": `Estimate` of the arm's score less the first arm's, over the questions that both
    answered (None for that one), "by_depth": shares by tenth (None: nothing lay there), "counts"}], "positions":
    {"edges": tokens, "ppl": {arm: [`Estimate`]}, "ratio": {arm: [`Estimate` of the arm's perplexity over the first
    arm's]}}, "sizes"}. Depth is that of questions for one hidden line.

    Raises:
        UserError: prompts past a model's positions, sizes that do not go together, or too little text.
    """
    finished = Finished() if finished is None else finished
    tasks = checked_tasks(tokenizer, documents, sizes)
    encode, longest = encoder(tokenizer), max(sizes.contexts)
    for arm in arms.values():
        limit, what = arm.model.config.max_position_embeddings, f"prompts of {longest} tokens are"
        check_positions(limit, longest, what, "shorten them with --context")
    sequences = text_sequences(encode, documents, longest, sizes.texts) if sizes.texts else []
    read = _selecting(arms, longest - 1)
    cells = [(task, context) for context in sizes.contexts for task in tasks]
    prompts = [task.examples("test", sizes.prompts, context) for task, context in cells]
    for arm in arms.values():  # now rather than after the other arms
        try_selection(arm.model, arm.selection, arm.top_k, torch.tensor(prompts[0][0].context))
    counts = {name: None if judged is None or name in judged else sizes.other_prompts for name in arms}
    asked = {
        (name, cell): prompts[cell][: counts[name]]
        for name in arms
        for cell, (_, context) in enumerate(cells)
        if name in _selecting(arms, context)
    }
    total, done = sum(map(len, asked.values())) + len(read) * len(sequences), 0
    figures: dict[str, Any] = {"tasks": [], "sizes": asdict(sizes)}
    if sequences:
        figures["positions"] = _positions(read, sequences, sizes.buckets, total, on_progress, finished)
        done = len(read) * len(sequences)
    found: dict[tuple[str, int], list[float]] = {}
    for name in dict.fromkeys(name for name, _ in asked):
        mine = {cell: f"{task.name} in {context:,} tokens, {name}" for cell, (task, context) in enumerate(cells)
                if (name, cell) in asked}  # fmt: skip
        for cell, what in mine.items():
            if what in finished:
                found[name, cell] = finished[what]
                done += len(asked[name, cell])
        if left := {cell: what for cell, what in mine.items() if (name, cell) not in found}:
            with answering(arms[name], tokenizer, longest) as answer:
                for cell, what in left.items():
                    values = _values(answer(cells[cell][0], asked[name, cell], part(on_progress, what, done, total)))
                    found[name, cell] = finished.add(what, values)
                    done += len(values)
        figures["tasks"] = _rows(list(arms), cells, asked, found)
        if on_figures is not None:
            on_figures(figures)
    return figures


def _rows(
    arms: Sequence[str],
    cells: Sequence[tuple[LongTask, int]],
    asked: Mapping[tuple[str, int], Sequence[LongExample]],
    found: Mapping[tuple[str, int], Sequence[float]],
) -> list[dict[str, Any]]:
    """A row for each cell and arm, an arm beside the first one that was asked there."""
    rows = []
    for cell, (task, context) in enumerate(cells):
        first: Sequence[float] | None = None
        for name in arms:
            if (name, cell) in found:
                row = _row(asked[name, cell], found[name, cell], first)
                rows.append({"task": task.name, "context": context, "arm": name} | row)
                first = first or found[name, cell]
    return rows


def _selecting(arms: Mapping[str, Arm], tokens: int) -> dict[str, Arm]:
    """The arms that do not select all of so many tokens."""
    return {name: arm for name, arm in arms.items() if arm.top_k is None or arm.top_k < tokens}


def _row(examples: Sequence[LongExample], values: Sequence[float], first: Sequence[float] | None) -> dict[str, Any]:
    groups = by_context(examples)
    clusters = [number for number, places in enumerate(groups) for _ in places]
    answered = [[values[place] for place in places] for places in groups]
    prompts = digest((list(example.context), example.prompt) for example in examples)
    difference = None
    if first is not None:
        both = min(len(values), len(first))  # the first questions, if one of the two was asked fewer
        pair = values[:both], first[:both], clusters[:both]
        difference = intervals.clustered_difference(*pair).to_dict()
    at = [(e.depth, value) for e, value in zip(examples, values, strict=True) if e.depth is not None]
    by_depth = depths(at)
    return {
        "score": share_of(answered, prompts),
        "contexts": len(groups),
        "shortest": min(example.length for example in examples),
        "difference": difference,
        "by_depth": list(by_depth.by_depth),
        "counts": list(by_depth.counts),
    }


def _values(found: Evaluation) -> list[float]:
    return [record.score.value for record in found.records]


def _positions(
    arms: Mapping[str, Arm],
    sequences: Sequence[Tensor],
    buckets: int,
    total: int,
    on_progress: OnProgress | None,
    finished: Finished,
) -> dict[str, Any]:
    found: dict[str, Perplexity] = {}
    for number, (name, arm) in enumerate(arms.items()):
        what = f"perplexity, {name}"
        if what not in finished:
            callback = part(on_progress, what, number * len(sequences), total)
            with asking(arm):
                finished.add(what, asdict(perplexity(arm.model, sequences, 0, buckets, callback)))
        found[name] = Perplexity(**finished[what])
    first, *others = found
    read, documents = texts_digest(sequences, found[first].edges), documents_of(sequences)

    def estimates(stretches: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
        return [ratio_of(nats, read, documents) for nats in stretches]

    return {
        "edges": list(found[first].edges),
        "ppl": {name: estimates(text.by_position()) for name, text in found.items()},
        "ratio": {name: estimates(found[name].less(found[first])) for name in others},
    }


def short_arms(model: DecoderForCausalLM, before: DecoderForCausalLM | None = None) -> dict[str, Arm]:
    """The model as it is, after the model that it was before its adaptation if there is one; without that, a sparse
    model after its own dense attention.
    """
    own = Arm(model, "indexer" if model.is_sparse else "dense")
    if before is not None:
        return {"before": Arm(before, "indexer" if before.is_sparse else "dense"), "model": own}
    return {"dense": Arm(model, "dense"), "sparse": own} if model.is_sparse else {"dense": own}


def judge_short(
    arms: Mapping[str, Arm],
    tokenizer: Any,
    documents: Sequence[Document],
    sizes: ShortSizes,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Small generated tasks with four choices (`tasks.short`), and the perplexity of short held-out texts.

    Returns {"tasks": [{"task", "arm", "score": `Estimate`, "difference": `Estimate` of the arm's score less the first
    arm's (None for that one)}], "texts": [{"arm", "ppl": `Estimate`, "ratio": `Estimate` of the arm's perplexity over
    the first arm's}], "sizes"}.

    Raises:
        UserError: nothing asked for, texts past a model's positions, or too little text.
    """
    if min(sizes.prompts, sizes.texts) < 1 or sizes.tokens < 2:
        raise UserError("short: ask for at least one prompt and one text of two tokens")
    for arm in arms.values():
        limit, what = arm.model.config.max_position_embeddings, f"texts of {sizes.tokens} tokens are"
        check_positions(limit, sizes.tokens, what, "lower short.tokens")
    encode = encoder(tokenizer)
    sequences = text_sequences(encode, documents, sizes.tokens, sizes.texts)
    total, done = len(arms) * (len(MAKES) * sizes.prompts + len(sequences)), 0
    rows, texts = [], []
    for task in map(Choices, MAKES):
        examples = task.examples("test", sizes.prompts)
        first: list[float] | None = None
        for name, arm in arms.items():
            with asking(arm):
                callback = part(on_progress, f"{task.name}, {name}", done, total)
                values = _values(choose(arm.model, encode, task, examples, callback))
            score = intervals.share(sum(values), len(values)).to_dict()
            score |= {"prompts": digest(e.prompt for e in examples), "by_context": [[value] for value in values]}
            difference = None if first is None else intervals.difference(values, first).to_dict()
            rows.append({"task": task.name, "arm": name, "score": score, "difference": difference})
            first, done = first or values, done + sizes.prompts
    known, read, of = None, texts_digest(sequences, [0]), documents_of(sequences)
    for name, arm in arms.items():
        with asking(arm):
            callback = part(on_progress, f"texts, {name}", done, total)
            losses = perplexity(arm.model, sequences, 0, 1, callback).by_text
        ratio = None
        if known is not None:
            ratio = ratio_of([a - b for a, b in zip(losses, known, strict=True)], read, of)
        texts.append({"arm": name, "ppl": ratio_of(losses, read, of), "ratio": ratio})
        known, done = known or list(losses), done + len(sequences)
    return {"tasks": rows, "texts": texts, "sizes": asdict(sizes)}


@contextmanager
def asking(arm: Arm) -> Iterator[None]:
    """Within the block the arm's model selects as the arm does, and is evaluated."""
    with evaluating(arm.model), selecting(arm.model, arm.selection, arm.top_k):
        yield
