"""Do layers agree? The kinds of tokens that each layer's indexer selects, and the keys that layers have in common.

Legend: S tokens of a text, N queries, T keys, L layers.
"""

import keyword
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from subject import SMALL_K, Subject, show
from torch import Tensor

from tokensieve.evals import Arm, intervals
from tokensieve.evals.suites import asking
from tokensieve.model import SelectionContext
from tokensieve.tasks import PlainEncoder

RECENT = 64  # keys that count as near


def kinds_of_tokens(encode: PlainEncoder, text: Tensor) -> dict[str, Tensor]:
    """{kind: (S) bool}. Every token is of one of the first six kinds; the others come besides."""
    pieces = [encode.decode([token]) for token in text.tolist()]
    words = [piece.strip() for piece in pieces]

    def kind(piece: str, word: str) -> str:
        if not word:
            return "line end" if "\n" in piece else "space"
        if word[0].isdigit():
            return "number"
        if keyword.iskeyword(word):
            return "keyword"
        return "word or name" if any(c.isalpha() for c in word) else "punctuation"

    of = [kind(*pair) for pair in zip(pieces, words, strict=True)]
    names = ("word or name", "keyword", "number", "punctuation", "line end", "space")
    found = {name: torch.tensor([name == one for one in of]) for name in names}
    after_end = [False, *("\n" in piece for piece in pieces[:-1])]
    defined = [False, *(word in ("def", "class") for word in words[:-1])]
    return found | {"first of a line": torch.tensor(after_end), "name after def or class": torch.tensor(defined)}


class Watching:
    """A selector that only watches what the indexer would select, and leaves attention dense.

    mask_LNT: whether a layer selects a key, of the queries `rows`.
    """

    def __init__(self, rows: Tensor):
        self.rows = rows
        self.mask_LNT: list[Tensor] = []

    def __call__(self, c: SelectionContext) -> None:
        chosen = c.rows(self.rows).topk().long()
        mask = torch.zeros(len(self.rows), int(c.ends_N.max()) + 1, dtype=torch.bool)
        mask.scatter_(1, chosen.where(chosen >= 0, mask.shape[1] - 1), True)
        self.mask_LNT.append(mask[:, :-1])


def look(subject: Subject, text: Tensor) -> dict[str, Any]:
    """What the layers would select in a text, for queries spread over all of it but its beginning.

    {"lift": {kind: [by layer]}, how often far keys of a kind are selected over how often they occur; "available":
    {kind: share of the far keys}; "near": share of the selected keys that are among the last RECENT, by layer; "first":
    share of the first 4 keys that are selected, by layer; "common": (L, L) share of common keys; "common_far": share
    of a layer's far keys that another selects too; "chance": share of common keys if both layers drew them}.
    """
    k, rows = SMALL_K, torch.linspace(4 * SMALL_K, len(text) - 1, subject.sizes.queries).long()
    watching = Watching(rows)
    with asking(Arm(subject.sparse, watching, k)):
        subject.sparse.model(input_ids=text[None])
    chosen_LNT = torch.stack(watching.mask_LNT).double()
    far_NT = (torch.arange(len(text)) <= rows[:, None] - RECENT).double()
    same_NT = text == text[rows][:, None]
    kinds = {name: mask.expand_as(far_NT) for name, mask in kinds_of_tokens(subject.encode, text).items()}
    kinds["the query's own token"] = same_NT
    kinds["after the query's own token"] = same_NT.roll(1, 1)  # the last key, which comes round, is not far
    available = {name: float((of_NT * far_NT).sum() / far_NT.sum()) for name, of_NT in kinds.items()}
    far_LNT = chosen_LNT * far_NT
    shares = {name: (far_LNT * of_NT).sum((1, 2)) / far_LNT.sum((1, 2)) for name, of_NT in kinds.items()}
    total = len(rows) * k
    return {
        "lift": {name: (of_L / available[name]).tolist() for name, of_L in shares.items() if available[name]},
        "available": available,
        "near": (1 - far_LNT.sum((1, 2)) / total).tolist(),
        "first": chosen_LNT[:, :, :4].mean((1, 2)).tolist(),
        "common": (torch.einsum("ant,bnt->ab", chosen_LNT, chosen_LNT) / total).tolist(),
        "common_far": (torch.einsum("ant,bnt->ab", far_LNT, far_LNT) / far_LNT.sum((1, 2))[:, None]).tolist(),
        "chance": float((k / (rows + 1)).mean()),
    }


def layers(subject: Subject) -> dict[str, Any]:
    """What each layer's indexer selects, k = SMALL_K: shares by kind beside what there is to select, and overlaps."""
    found = [look(subject, text) for text in subject.texts]
    count = len(subject.sparse.model.layers)

    def cells(by_text: Sequence[Sequence[float]]) -> list[str]:
        estimates = [intervals.mean(of_texts) for of_texts in zip(*by_text, strict=True)]
        return [f"{e.value:.2f}" + ("" if e.high is None else f" ± {e.high - e.value:.2f}") for e in estimates]

    head = [f"layer {layer}" for layer in range(count)]
    of_kinds = [
        (kind, f"{100 * statistics.fmean(of['available'][kind] for of in found):.1f}%",
         *cells([of["lift"][kind] for of in found if kind in of["lift"]]))
        for kind in found[0]["lift"]
    ]  # fmt: skip
    show(f"How often far keys of a kind are selected, over how often they occur; {len(found)} texts, k = {SMALL_K}",
         ("kind", "share of the far keys", *head), of_kinds)  # fmt: skip
    show("By position", ("", *head),
         [(f"share of the selected keys that are among the last {RECENT}", *cells([of["near"] for of in found])),
          ("share of the first 4 keys that are selected", *cells([of["first"] for of in found]))])  # fmt: skip
    chance = statistics.fmean(of["chance"] for of in found)
    show(f"Common keys of two layers, over k; {chance:.2f} if both drew them", ("", *head),
         [(name, *cells([of["common"][layer] for of in found])) for layer, name in enumerate(head)])  # fmt: skip
    show("Share of a layer's far keys that another layer selects too", ("", *head),
         [(name, *cells([of["common_far"][layer] for of in found])) for layer, name in enumerate(head)])  # fmt: skip
    return {"texts": found}
