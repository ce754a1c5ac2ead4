"""Replay: training reads the keys that the rollout read, so that both see the same model.

Legend: L layers, B rows, S tokens of a row, T tokens of a rollout, K keys of a query.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.model.context import filling
from tokensieve.posttrain.rollouts import Rollout


@contextmanager
def replaying(model: nn.Module, rollouts: Sequence[Rollout] | Callable[[], Sequence[Rollout]]) -> Iterator[None]:
    """Within the block every pass of `model` over rows of these rollouts reads the keys that the rollout read.

    Rows are found by their tokens, whatever their order and padding, so this works for whatever code calls the model
    (TRL's GRPOTrainer, say). rollouts: or a function that returns them, for a loop that samples anew. A pass takes
    `input_ids` and, if rows are padded, `attention_mask`. UserError for a model that is not tokensieve's, a rollout
    without a selection, and a row that is none of the rollouts.
    """
    if not callable(rollouts):
        check_replayable(rollouts)

    def fill(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        ids = args[0] if args else kwargs["input_ids"]
        latest = rollouts() if callable(rollouts) else rollouts
        check_replayable(latest)
        return {"selection": selection_of(ids, kwargs.get("attention_mask"), latest)}

    with filling(model, fill):
        yield


def check_replayable(rollouts: Sequence[Rollout]) -> None:
    """UserError if a rollout kept no selection."""
    if any(not rollout.selection for rollout in rollouts):
        raise UserError("a rollout has no selection to replay; sample with keep_selection=True")


def selection_of(ids_BS: Tensor, mask_BS: Tensor | None, rollouts: Sequence[Rollout]) -> list[Tensor]:
    """Per layer the positions (B, S, K) within each row; -1 for padding.

    A row is a rollout, or the prompt of one whose answer is masked. Rows of equal tokens take their rollouts in turn.
    """
    whole: dict[tuple[int, ...], list[tuple[tuple[Tensor, ...], int]]] = {}
    for rollout in rollouts:
        for tokens in ((*rollout.prompt, *rollout.answer), rollout.prompt):
            whole.setdefault(tokens, []).append((rollout.selection, len(tokens)))
    kept = torch.ones_like(ids_BS, dtype=torch.bool) if mask_BS is None else mask_BS.bool()
    rows: list[Tensor] = []
    used: dict[tuple[int, ...], int] = {}
    moved: dict[int, Tensor] = {}  # parts by id: on a GPU the work is a fraction of the CPU's, and samples share some
    for ids_S, kept_S in zip(ids_BS.tolist(), kept.tolist(), strict=True):
        first = kept_S.index(True) if True in kept_S else 0
        tokens = tuple(token for token, real in zip(ids_S, kept_S, strict=True) if real)
        if tokens not in whole:
            raise UserError(f"a row of {len(tokens)} tokens is none of the rollouts that are replayed")
        turn = used.get(tokens, 0)
        used[tokens] = turn + 1
        parts, length = whole[tokens][turn % len(whole[tokens])]
        for part in parts:
            if id(part) not in moved:
                moved[id(part)] = part.to(ids_BS.device, non_blocking=True)
        rows.append(_of_row(torch.cat([moved[id(part)] for part in parts], 1), length, first, len(ids_S)))
    return list(torch.stack(rows, 1))


def _of_row(indices_LTK: Tensor, tokens: int, first: int, length: int) -> Tensor:
    """(layers, S, K) for a row of `tokens` tokens that begin at `first`.

    The rollout did not run its last token, which reads what the one before it read.
    """
    rows = indices_LTK[:, :tokens]
    if rows.shape[1] < tokens:
        rows = torch.cat((rows, rows[:, -1:]), 1)
    shifted = torch.where(rows < 0, rows, rows + first)
    return F.pad(shifted, (0, 0, first, length - first - tokens), value=-1)
