"""A sparse model beside its controls: the figures that `tokensieve eval` and the speedrun take of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokensieve import cost
from tokensieve.config import ParitySizes, UserError
from tokensieve.evals.losses import text_sequences
from tokensieve.evals.mass import recall
from tokensieve.evals.parity import ARMS, Arm, arms_of, compare, metrics_of
from tokensieve.evals.progress import OnProgress
from tokensieve.evals.trial import try_selection
from tokensieve.model import DecoderForCausalLM, selecting
from tokensieve.model.positions import check_positions
from tokensieve.tasks import Document, Documents, encoder
from tokensieve.tasks.retrieval import MAX_NEEDLES, Needles

# Keys of a metrics.json beside its arms.
FIGURES = (
    "compared",
    "recall",
    "kv_read_fraction",
    "decode_ms",
    "chunk_ms",
    "top_k",
    "context",
    "selections",
    "long",
    "short",
    "model",
    "seconds",
    "run",
)


def judge_sparse(
    model: DecoderForCausalLM,
    tokenizer: Any,
    documents: Sequence[Document],
    context: int,
    sizes: ParitySizes,
    dense: DecoderForCausalLM | None = None,
    selections: Mapping[str, str] | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """The arms of a sparse model on the same prompts of `context` tokens, all longer than k.

    Args:
        documents: held-out ones.
        sizes: how many texts, needle contexts and measured queries.
        dense: the model to compare with; None: the sparse model's own trunk, attending densely.
        selections: further arms, {name: selection}, beside those of `arms_of`.

    Returns {arm: {"ppl", "needle"}, "recall": {"last"}, "kv_read_fraction", "top_k", "context"}, which
    `criteria.parity_criteria` judges, and "selections" if there are any.

    Raises:
        UserError: prompts past the model's positions or not longer than k, or an arm of a name that is taken or of a
            selection that is unknown.
    """
    k, more = model.top_k, dict(selections or {})
    limit, what = model.config.max_position_embeddings, f"prompts of {context} tokens are"
    check_positions(limit, context, what, "shorten them with --context")
    if sizes.needle_contexts < 1:
        raise UserError("sparse.needle_contexts is 0; ask for the needles of at least one context")
    if context <= k:
        raise UserError(f"prompts of {context} tokens are not longer than k = {k}: nothing is selected; see --context")
    for name, selection in more.items():
        if name in (*ARMS, *FIGURES):
            raise UserError(f"an arm cannot be called {name}, which names something else in metrics.json; rename it")
        with selecting(model, selection):  # an unknown one is refused now rather than after the other arms
            pass
    if context - 1 <= sizes.ppl_after:
        raise UserError(
            f"sparse.ppl_after is {sizes.ppl_after}: it must be at most {context - 2}, the context less two"
        )
    encode = encoder(tokenizer)
    sequences = text_sequences(encode, documents, context, sizes.texts)
    task = Needles(encode, Documents(test=documents), context=context)
    needles = task.examples("test", sizes.needle_contexts * MAX_NEEDLES)
    arms = arms_of(model) | {name: Arm(model, selection) for name, selection in more.items()}
    if dense is not None:
        arms["dense"] = Arm(dense, "dense")
    for arm in arms.values():  # now rather than after the other arms
        try_selection(arm.model, arm.selection, arm.top_k, sequences[0])
    scores = compare(arms, encode, sequences, task, needles, k, on_progress, sizes.ppl_after)
    if on_progress is not None:
        on_progress("recall", 0, 1)
    held = recall(model, sequences[: sizes.recall_sequences], queries=sizes.recall_queries)
    if on_progress is not None:
        on_progress("recall", 1, 1)
    figures = {"recall": {"last": held.overall}, "kv_read_fraction": cost.kv_read_fraction(context, k)}
    figures |= {"top_k": k, "context": context} | ({"selections": more} if more else {})
    return {**metrics_of(scores), **figures}
