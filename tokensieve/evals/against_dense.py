"""The suite "parity": sparse against dense attention on the same prompts, for several k, beside controls.

Up to k keys sparse attention is dense attention, so nothing is called parity unless every prompt is longer than k.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tokensieve.config import LongSizes, UserError
from tokensieve.evals import intervals
from tokensieve.evals.evaluation import PREFILL_CHUNK
from tokensieve.evals.finished import Finished
from tokensieve.evals.losses import Perplexity, documents_of, perplexity_of, predictions, text_sequences
from tokensieve.evals.mass import recall
from tokensieve.evals.paired import ratio_of, texts_digest
from tokensieve.evals.parity import Arm
from tokensieve.evals.parity_verdict import verdicts
from tokensieve.evals.progress import OnProgress, part
from tokensieve.evals.suites import asking, judge_long
from tokensieve.evaluate_config import AgainstDenseSizes
from tokensieve.model import DecoderForCausalLM, LatentCache
from tokensieve.model.positions import check_positions
from tokensieve.model.selection import resolve
from tokensieve.tasks import Document, encoder

KINDS = {"sparse": "indexer", "window": "window", "sinks": "sinks", "oracle": "oracle"}
ANSWERING = ("sparse", "window")  # kinds that are asked the tasks, beside dense attention
RECALLED = ("sparse", "window")  # kinds whose keys' share of the attention's mass is measured
SWEEP = (4, 2, 1)  # of the model's k, that each sparse arm selects one part unless told otherwise


def swept(model: DecoderForCausalLM, sizes: AgainstDenseSizes) -> tuple[int, ...]:
    """The numbers of keys that are compared, ascending.

    Raises:
        UserError: one is below 5, of which sinks takes 4.
    """
    ks = tuple(sorted(set(sizes.top_k or (model.top_k // parts for parts in SWEEP))))
    if ks[0] < 5:
        raise UserError(f"parity.top_k: {ks[0]} keys are too few for the arm sinks; use 5 or more")
    return ks


def judge_parity(
    model: DecoderForCausalLM,
    tokenizer: Any,
    documents: Sequence[Document],
    sizes: AgainstDenseSizes,
    long: LongSizes,
    context: int | None = None,
    dense: DecoderForCausalLM | None = None,
    on_progress: OnProgress | None = None,
    finished: Finished | None = None,
) -> dict[str, Any]:
    """Perplexity, greedy continuations, recall of the attention's mass, and tasks: dense attention against each k.

    Perplexity is that of the tokens after the largest k, so that every k is measured on the same ones. A continuation
    is what dense attention writes greedily after a text. It is read with every arm: `same` is the share of its tokens
    that are the arm's best ones too, and `first` how many tokens the arm would write alike, greedily, before the first
    that differs. The arm dense reads its own, which shows what rounding does. Recall is measured on the hidden states
    of the sparse model with dense attention.

    Args:
        long: knobs of the tasks; what they are asked is said by `sizes`.
        context: tokens of the prompts; None: those of `sizes`.
        dense: the model to compare with, such as that before adaptation; None: the model itself, attending to all keys.
        finished: what was measured before, which is not measured again.

    Returns {"context", "top_k": numbers, "texts": [{"arm", "k", "ppl", "ratio": over dense, "same", "first"}],
    "positions": {"edges", "ratio": {arm: [`Estimate`]}}, "recall": [{"arm", "k", "overall", "by_layer": [`Estimate`],
    "best": [share of the best keys by layer]}], "tasks": as `judge_long`, "verdicts": as `parity_verdict.verdicts`,
    "sizes"}, where "ppl", "ratio", "same", "first" and "overall" are `Estimate`s.

    Raises:
        UserError: a dense model, prompts not longer than k or past the model's positions, or too little text.
    """
    if not model.is_sparse:
        raise UserError("parity compares a sparse model with dense attention, and this one is dense; sparsify it first")
    ks, finished = swept(model, sizes), Finished() if finished is None else finished
    context = context or max(sizes.context, sizes.times_k * model.top_k)
    if context - 1 <= ks[-1]:
        raise UserError(
            f"prompts of {context} tokens are not longer than k = {ks[-1]}: there sparse attention is dense attention, "
            "and nothing can be called parity; lengthen them with --context, or lower parity.top_k"
        )
    arms = {"dense": Arm(dense or model, "dense")}
    arms |= {f"{kind} k={k}": Arm(model, selection, k) for k in ks for kind, selection in KINDS.items()}
    for arm in arms.values():
        what = f"prompts of {context} tokens and {sizes.written} more are"
        limit = arm.model.config.max_position_embeddings
        check_positions(limit, context + sizes.written, what, "shorten them with --context")
    asked = {name: arm for name, arm in arms.items() if name.partition(" ")[0] in ("dense", *ANSWERING)}
    recalled = {f"{kind} k={k}": (kind, k) for k in ks for kind in RECALLED}
    tasks = replace(long, contexts=(context,), tasks=sizes.tasks, prompts=sizes.prompts, texts=0)
    sequences = text_sequences(encoder(tokenizer), documents, context, sizes.texts)

    n, done, origins = len(sequences), 0, documents_of(sequences)
    total = n * (1 + len(arms) + len(recalled)) + len(asked) * len(sizes.tasks) * sizes.prompts
    if "continuations" not in finished:
        callback = part(on_progress, "continuations, dense", done, total)
        finished.add("continuations", _continuations(arms["dense"], sequences, sizes.written, callback))
    written = [torch.tensor(tokens) for tokens in finished["continuations"]]
    done += n
    for name, arm in arms.items():
        if f"texts, {name}" not in finished:
            callback = part(on_progress, f"texts, {name}", done, total)
            finished.add(f"texts, {name}", _read(arm, sequences, written, ks[-1], sizes.buckets, callback))
        done += n
    for name, (kind, k) in recalled.items():
        if f"recall, {name}" not in finished:
            callback = part(on_progress, f"recall, {name}", done, total)
            finished.add(f"recall, {name}", _recalls(model, sequences, k, KINDS[kind], sizes.recall_queries, callback))
        done += n
    later = None
    if on_progress is not None:
        tell = on_progress
        later = lambda what, more, _: tell(what, done + more, total)  # noqa: E731
    answers = judge_long(asked, tokenizer, documents, tasks, later, finished=finished) if sizes.tasks else {"tasks": []}
    figures = {
        "context": context,
        "top_k": list(ks),
        **_texts({name: finished[f"texts, {name}"] for name in arms}, texts_digest(sequences, ks), origins),
        "recall": [
            {"arm": name, "k": k, **_recall(finished[f"recall, {name}"], origins)} for name, (_, k) in recalled.items()
        ],
        "tasks": answers["tasks"],
        "sizes": asdict(sizes) | {"long": asdict(tasks)},
    }
    return figures | {"verdicts": verdicts(figures, sizes.ppl_loss, sizes.task_loss)}


def _continuations(
    arm: Arm, sequences: Sequence[Tensor], count: int, on_progress: OnProgress | None
) -> list[list[int]]:
    """`count` tokens that the arm writes greedily after each sequence; it goes on after an end marker."""
    found = []
    with asking(arm):
        for done, ids in enumerate(sequences, 1):
            cache, tokens = LatentCache(), ids.to(arm.model.lm_head.weight.device)[None]
            for begin in range(0, len(ids), PREFILL_CHUNK):
                chunk = tokens[:, begin : begin + PREFILL_CHUNK]
                output = arm.model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
            written = [output.logits[0, -1].argmax()]
            while len(written) < count:
                output = arm.model(written[-1][None, None], past_key_values=cache, use_cache=True)
                written.append(output.logits[0, -1].argmax())
            found.append(torch.stack(written).tolist())
            if on_progress is not None:
                on_progress("", done, len(sequences))
    return found


def _read(
    arm: Arm,
    sequences: Sequence[Tensor],
    written: Sequence[Tensor],
    after: int,
    buckets: int,
    on_progress: OnProgress | None,
) -> dict[str, Any]:
    """{"perplexity": of the sequences, after so many tokens, "same": of each token written, whether the arm writes it
    too}.
    """
    losses, same = [], []
    with asking(arm):
        for done, (ids, tokens) in enumerate(zip(sequences, written, strict=True), 1):
            of_tokens, best = predictions(arm.model, torch.cat((ids, tokens)))
            losses.append(of_tokens[: len(ids) - 1])
            same.append((best[len(ids) - 1 :] == tokens).int().tolist())
            if on_progress is not None:
                on_progress("", done, len(sequences))
    figures = perplexity_of(torch.stack(losses), after, buckets, documents_of(sequences))
    return {"perplexity": asdict(figures), "same": same}


def _recalls(
    model: DecoderForCausalLM,
    sequences: Sequence[Tensor],
    k: int,
    selection: str,
    queries: int,
    on_progress: OnProgress | None,
) -> list[dict[str, Any]]:
    found = []
    selector = resolve(selection)
    for done, ids in enumerate(sequences, 1):
        found.append(asdict(recall(model, [ids], k, queries, selector)))
        if on_progress is not None:
            on_progress("", done, len(sequences))
    return found


def _texts(read: Mapping[str, Mapping[str, Any]], prompts: str, documents: Sequence[int]) -> dict[str, Any]:
    """The rows "texts", and the arms' perplexity by position. prompts: digest of the texts. documents: of each text."""
    found = {name: Perplexity(**figures["perplexity"]) for name, figures in read.items()}
    first = next(iter(found.values()))
    rows = []
    for name, text in found.items():
        differences = [a - b for a, b in zip(text.by_text, first.by_text, strict=True)]
        same = read[name]["same"]
        clusters = [document for document, tokens in zip(documents, same, strict=True) for _ in tokens]
        rows.append(
            {
                "arm": name,
                "k": int(name.partition("=")[2]) if "=" in name else None,
                "ppl": ratio_of(text.by_text, prompts, documents),
                "ratio": None if text is first else ratio_of(differences, prompts, documents),
                "same": intervals.clustered_share([*chain(*same)], clusters).to_dict(),
                "first": intervals.mean([[*tokens, 0].index(0) for tokens in same], documents).to_dict(),
            }
        )
    others = {name: text for name, text in found.items() if text is not first}
    ratios = {name: [ratio_of(nats, prompts, documents) for nats in text.less(first)] for name, text in others.items()}
    return {"texts": rows, "positions": {"edges": list(first.edges), "ratio": ratios}}


def _recall(by_text: Sequence[Mapping[str, Any]], documents: Sequence[int]) -> dict[str, Any]:
    layers = zip(*(text["by_layer"] for text in by_text), strict=True)
    best = zip(*(text["best"] for text in by_text), strict=True)
    return {
        "overall": intervals.mean([text["overall"] for text in by_text], documents).to_dict(),
        "by_layer": [intervals.mean(layer, documents).to_dict() for layer in layers],
        "best": [intervals.mean(layer).value for layer in best],
    }
