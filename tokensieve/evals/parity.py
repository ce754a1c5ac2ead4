"""Dense against sparse on the same prompts: the arms, and what each scores.

All prompts are longer than k: up to there sparse attention is dense attention, and nothing would be tested.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokensieve.config import UserError
from tokensieve.evals.text import Perplexity, evaluating, perplexity
from tokensieve.model import DecoderForCausalLM, selecting
from tokensieve.model.selection import Selector
from tokensieve.tasks import retrieval

# True of the demo, whose dense arm is the base model, and of `eval`, whose arms are one model.
ARMS = {
    "dense": "attends to every key",
    "dense_adapted": "attends to every key; trained on the same further tokens as sparse",
    "sparse": "attends to the k keys that its indexer selects",
    "untrained_indexer": "as sparse, with an indexer that was never trained",
    "window": "as sparse, but the last k keys are selected",
    "oracle": "as sparse, but the true attention's own top k are selected",
}

OnStep = Callable[[str], None]  # told the arm's name after each sequence and each context


@dataclass(frozen=True)
class Arm:
    """A model and who selects in it: a name (indexer, window, oracle, dense) or a function."""

    model: DecoderForCausalLM
    selection: str | Selector


@dataclass(frozen=True)
class Score:
    text: Perplexity
    needles: retrieval.NeedleScore


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
    sequences: Sequence[Tensor],
    contexts: Sequence[retrieval.NeedleContext],
    top_k: int,
    on_step: OnStep | None = None,
) -> dict[str, Score]:
    """Perplexity and needle accuracy of every arm on the same held-out sequences and the same needle contexts.

    Each arm reads a needle context once, by its own selection, and answers every question from that cache.

    Raises:
        UserError: a prompt of at most k tokens, or no prompts.
    """
    shortest = min((len(c.context_ids) for c in contexts), default=0)
    if shortest <= top_k:
        raise UserError(
            f"needle contexts of {shortest} tokens are not longer than k = {top_k} and test nothing; use longer ones"
        )
    scores = {}
    for name, arm in arms.items():
        told = (lambda *_, name=name: on_step(name)) if on_step is not None else None
        with evaluating(arm.model), selecting(arm.model, arm.selection, top_k):
            text = perplexity(arm.model, sequences, top_k, done=told)
            scores[name] = Score(text, retrieval.evaluate(arm.model, contexts, on_context=told))
    return scores


def metrics_of(scores: Mapping[str, Score]) -> dict[str, dict[str, float]]:
    """{arm: {"ppl", "needle"}} in the order of `ARMS`; ppl where more than k tokens are seen, needle as a share."""
    order = [*(a for a in ARMS if a in scores), *(a for a in scores if a not in ARMS)]
    return {a: {"ppl": scores[a].text.ppl, "needle": scores[a].needles.accuracy} for a in order}


def loss_by_position(scores: Mapping[str, Score]) -> dict[str, Any]:
    """What the report plots: {"edges": tokens, "loss": {arm: nats per stretch}}."""
    edges = next(iter(scores.values())).text.edges
    return {"edges": list(edges), "loss": {name: list(s.text.loss) for name, s in scores.items()}}
