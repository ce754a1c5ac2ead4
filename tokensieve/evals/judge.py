"""A sparse model, judged: what `tokensieve eval` and the speedrun measure of it."""

from collections.abc import Sequence
from typing import Any

from tokensieve import cost
from tokensieve.config import UserError
from tokensieve.evals.mass import recall
from tokensieve.evals.parity import Arm, OnStep, arms_of, compare, metrics_of
from tokensieve.evals.text import check_room, text_sequences
from tokensieve.model import DecoderForCausalLM
from tokensieve.tasks import Document, PlainEncoder, retrieval

RECALL_SEQUENCES, RECALL_QUERIES = 2, 128  # held-out sequences, and queries measured in each layer of each


def judge_sparse(
    model: DecoderForCausalLM,
    tokenizer: Any,
    documents: Sequence[Document],
    context: int,
    texts: int = 16,
    needle_contexts: int = 8,
    dense: DecoderForCausalLM | None = None,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """The arms of a sparse model on the same prompts of `context` tokens, all longer than k.

    `dense`: the model to compare with; None: the sparse model's own trunk, attending densely. Returns {arm: {"ppl",
    "needle"}, "recall": {"last"}, "kv_read_fraction", "top_k", "context"}, which `criteria.parity_criteria` judges.

    Raises:
        UserError: prompts past the model's positions, or not longer than k.
    """
    k = model.top_k
    check_room(model, context)
    if context <= k:
        raise UserError(f"prompts of {context} tokens are not longer than k = {k}: nothing is selected; see --context")
    encode = PlainEncoder(tokenizer)
    sequences = text_sequences(encode, documents, context, texts)
    needles = retrieval.needle_contexts(encode, documents, context, count=needle_contexts)
    arms = arms_of(model)
    if dense is not None:
        arms["dense"] = Arm(dense, "dense")
    scores = compare(arms, sequences, needles, k, on_step)
    if on_step is not None:
        on_step("recall")
    held = recall(model, sequences[:RECALL_SEQUENCES], queries=RECALL_QUERIES)
    figures = {"recall": {"last": held.overall}, "kv_read_fraction": cost.kv_read_fraction(context, k)}
    return {**metrics_of(scores), **figures, "top_k": k, "context": context}
