"""A number of keys for each layer, learned in a run (`TrainConfig.budget`) and kept in the model's config.

Legend: S tokens of a packed sequence.
"""

import logging
from itertools import pairwise

from torch import Tensor

from tokensieve import evals
from tokensieve.config import TrainConfig, UserError
from tokensieve.data import PackedDataset
from tokensieve.evals.budget import check_budget
from tokensieve.families import TOP_K_BY_LAYER
from tokensieve.model import DecoderForCausalLM

log = logging.getLogger("tokensieve")


def budget_texts(config: TrainConfig, model: DecoderForCausalLM, dataset: PackedDataset) -> list[Tensor]:
    """The documents, int64 (tokens), that the numbers will be learned from: those of more than k tokens in the first
    sequences of the dataset. None without a budget.

    UserError if it has no such documents, or if the model's keys cannot be shared out.
    """
    if config.budget is None:
        return []
    check_budget(model, model.top_k)
    rows = (dataset[i] for i in range(min(config.budget.sequences, len(dataset))))
    texts = [text for row in rows for text in _documents(row["input_ids"], row["position_ids"])]
    if not (long := [text for text in texts if len(text) > model.top_k]):
        raise UserError(
            f"budget: no document in {config.budget.sequences} sequences has more than k = {model.top_k} tokens, so "
            "nothing is selected there; lengthen phases.context, or set budget.sequences higher"
        )
    return long


def _documents(ids_S: Tensor, positions_S: Tensor) -> list[Tensor]:
    """The documents of a packed sequence: a position of 0 begins one."""
    begins = [*(positions_S == 0).nonzero().flatten().tolist(), len(ids_S)]
    return [ids_S[a:b] for a, b in pairwise(begins)]


def learn_budget(config: TrainConfig, model: DecoderForCausalLM, texts: list[Tensor], done: int, last: int) -> None:
    """Called after `done` of `last` steps. Once in a run, warm-up's end or adaptation's beginning, the model gets
    numbers of keys for its layers, `index_topk` in the mean: those with which attention to its indexers' best keys is
    nearest to attention to all keys of the texts (`tokensieve.evals.fitted_k`).
    """
    if config.budget is None or done != {"warmup": last, "adapt": 0}[config.stage]:
        return
    ks = evals.fitted_k(model, texts, most=config.budget.most, queries=config.budget.queries)
    setattr(model.config, TOP_K_BY_LAYER, list(ks))
    log.info("%s: keys by layer %s", config.stage, ", ".join(map(str, ks)))
