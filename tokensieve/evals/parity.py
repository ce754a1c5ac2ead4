"""Dense against sparse on the same prompts: the arms, and the scores of each.

All prompts are longer than k: up to there sparse attention is dense attention, and nothing would be tested.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor

from tokensieve.config import UserError
from tokensieve.evals import intervals
from tokensieve.evals.evaluation import Evaluation, by_context, evaluate, evaluating
from tokensieve.evals.losses import Perplexity, perplexity
from tokensieve.evals.paired import digest, ratio_of, share_of, texts_digest
from tokensieve.evals.progress import OnProgress, part
from tokensieve.model import DecoderForCausalLM, selecting
from tokensieve.model.selection import Selector
from tokensieve.tasks.retrieval import NeedleExample, Needles

# True of the demo, whose dense arm is the base model, and of `eval`, whose arms are one model.
ARMS = {
    "dense": "attends to every key",
    "dense_adapted": "attends to every key; trained on the same further tokens as sparse",
    "sparse": "attends to the k keys that its indexer selects",
    "untrained_indexer": "as sparse, with an indexer that was never trained",
    "window": "as sparse, but the last k keys are selected",
    "oracle": "as sparse, but the true attention's own top k are selected: a reference, not a bound",
}

CONTROLS = ("untrained_indexer", "window")  # selections that are not trained
JUDGED_ON_TEXTS = ("dense", "sparse", "oracle")  # arms whose perplexity decides something
JUDGED_ON_NEEDLES = ("dense", "sparse", *CONTROLS)


@dataclass(frozen=True)
class Arm:
    """A model and its selection, which `selecting` takes: one of SELECTOR_NAMES, or a function.

    top_k: keys that it selects; None leaves them to the caller, or to the model's config.
    """

    model: DecoderForCausalLM
    selection: str | Selector
    top_k: int | None = None


@dataclass(frozen=True)
class ArmScores:
    """needles: None if none were asked for. read: `paired.texts_digest`."""

    text: Perplexity
    needles: Evaluation | None
    read: str


def arms_of(model: DecoderForCausalLM) -> dict[str, Arm]:
    """The arms of one sparse model: the same tensors with and without selection, and the two controls that need no
    other model.
    """
    chosen = {"dense": "dense", "sparse": "indexer", "window": "window", "oracle": "oracle"}
    return {name: Arm(model, selection) for name, selection in chosen.items()}


def demo_arms(
    base: DecoderForCausalLM,
    dense_adapted: DecoderForCausalLM,
    sparse: DecoderForCausalLM,
    untrained: DecoderForCausalLM,
) -> dict[str, Arm]:
    """All six arms (`ARMS`). The controls share the adapted trunk, so that they differ from `sparse` in the selection
    and in nothing else.

    `untrained`: any sparse model of the same shape whose indexers are still as `sparsify` made them.
    """
    control = copy.deepcopy(sparse)
    control.load_state_dict({n: t for n, t in untrained.state_dict().items() if ".indexer." in n}, strict=False)
    return {
        "dense": Arm(base, "dense"),
        "dense_adapted": Arm(dense_adapted, "dense"),
        **{name: arm for name, arm in arms_of(sparse).items() if name != "dense"},
        "untrained_indexer": Arm(control, "indexer"),
    }


def compare(
    arms: Mapping[str, Arm],
    tokenizer: Any,
    sequences: Sequence[Tensor],
    task: Needles,
    needles: Sequence[NeedleExample],
    top_k: int,
    on_progress: OnProgress | None = None,
    ppl_after: int = 0,
    other_prompts: int | None = None,
) -> dict[str, ArmScores]:
    """Perplexity and needle accuracy of every arm on the same held-out sequences and the same questions of `task`.

    Each arm reads a needle context once, by its own selection, and answers every question from that cache. Without
    `needles` there is perplexity alone. Perplexity is that of the tokens after the first `top_k`, or after the first
    `ppl_after` if these are more. If `other_prompts` is given, arms that are not `JUDGED_ON_TEXTS` read only so many of
    the sequences, the first ones, and arms that are not `JUDGED_ON_NEEDLES` only so many of the needle contexts.
    `on_progress` is called with the arm's name after each sequence and each context.

    Raises:
        UserError: a prompt of at most k tokens, or no texts.
    """
    shortest = min((len(example.context) for example in needles), default=None)
    if shortest is not None and shortest <= top_k:
        raise UserError(
            f"needle contexts of {shortest} tokens are not longer than k = {top_k} and test nothing; use longer ones"
        )
    scores = {}
    contexts = [[needles[place] for place in places] for places in by_context(needles)]
    read = {name: sequences if name in JUDGED_ON_TEXTS else sequences[:other_prompts] for name in arms}
    asked = {name: contexts if name in JUDGED_ON_NEEDLES else contexts[:other_prompts] for name in arms}
    total, done = sum(map(len, (*read.values(), *asked.values()))), 0
    for name, arm in arms.items():
        texts = part(on_progress, name, done, total)
        questions = part(on_progress, name, done + len(read[name]), total)
        done += len(read[name]) + len(asked[name])
        examples = [example for context in asked[name] for example in context]
        with evaluating(arm.model), selecting(arm.model, arm.selection, arm.top_k or top_k):
            text = perplexity(arm.model, read[name], max(top_k, ppl_after), on_progress=texts)
            found = evaluate(arm.model, tokenizer, task, examples, on_progress=questions) if examples else None
            scores[name] = ArmScores(text, found, texts_digest(read[name], [max(top_k, ppl_after)]))
    return scores


def metrics_of(scores: Mapping[str, ArmScores]) -> dict[str, dict[str, Any]]:
    """{arm: {"ppl", "needle", "needle_interval", "estimates"}} in the order of `ARMS`, and "compared" with what the
    arms are to each other.

    ppl: where more than k tokens are seen, on the texts that all arms read (`shared_texts`). needle: share of the arm's
    questions answered, with its 95% interval. estimates: {"ppl", "needle"} of all that the arm read, to be compared
    with another run's (`paired`). All intervals are over documents and contexts, since texts of one document and
    questions of one context may err together: both bounds are None if there is only one. compared: {"ppl":
    {arm: sparse perplexity / the arm's}, "needle": {arm: share of sparse - the arm's}}, each an `Estimate` over all
    texts or questions that both read. In "needle" the arms `untrained_indexer` and `window` are compared with dense,
    from which they shall differ, as dense - the arm. What has to do with needles is left out if none were asked for.
    """
    order = [*(a for a in ARMS if a in scores), *(a for a in scores if a not in ARMS)]
    figures: dict[str, dict[str, Any]] = {}
    for arm in order:
        text = scores[arm].text
        estimates = {"ppl": ratio_of(text.by_text, scores[arm].read, text.documents)}
        figures[arm] = {"ppl": text.ppl_of(shared_texts(scores)), "estimates": estimates}
        if scores[arm].needles is not None:
            found = estimates["needle"] = _needles(scores[arm])
            figures[arm] |= {"needle": found["value"], "needle_interval": [found["low"], found["high"]]}
    return figures | {"compared": _compared(scores)}


def shared_texts(scores: Mapping[str, ArmScores]) -> int:
    """The number of texts that all arms read: the first ones."""
    return min(len(found.text.by_text) for found in scores.values())


def _answered(scores: ArmScores) -> list[list[float]]:
    """The scores of the questions of each context."""
    if scores.needles is None:
        return []
    records = scores.needles.records
    groups = by_context([record.example for record in records])
    return [[records[place].score.value for place in places] for places in groups]


def _needles(scores: ArmScores) -> dict[str, Any]:
    """The share of the questions that were answered, with an interval over contexts, for `paired.compared`."""
    assert scores.needles is not None
    examples = [record.example for record in scores.needles.records]
    prompts = digest((list(example.context), example.prompt) for example in examples)
    return share_of(_answered(scores), prompts)


def _compared(scores: Mapping[str, ArmScores]) -> dict[str, dict[str, Any]]:
    sparse, dense = scores["sparse"], scores["dense"]
    ppl, needle = {}, {}
    for name, other in scores.items():
        if name == "sparse":
            continue
        differences = [a - b for a, b in zip(sparse.text.by_text, other.text.by_text, strict=False)]
        documents = sparse.text.documents
        ppl[name] = intervals.ratio(differences, documents and documents[: len(differences)]).to_dict()
        pair = (dense, other) if name in CONTROLS else (sparse, other)
        a, b = map(_answered, pair)
        if contexts := min(len(a), len(b)):  # the first ones, if one arm was asked fewer
            clusters = [number for number, values in enumerate(a[:contexts]) for _ in values]
            values = [*chain(*a[:contexts])], [*chain(*b[:contexts])]
            needle[name] = intervals.clustered_difference(*values, clusters).to_dict()
    return {"ppl": ppl, "needle": needle}


def loss_by_position(scores: Mapping[str, ArmScores]) -> dict[str, Any]:
    """The report's curves, of the texts that all arms read: {"edges": tokens, "loss": {arm: nats per stretch}}."""
    edges, texts = next(iter(scores.values())).text.edges, shared_texts(scores)
    return {"edges": list(edges), "loss": {name: s.text.loss_of(texts) for name, s in scores.items()}}
