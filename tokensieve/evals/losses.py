"""How well a model predicts held-out text, and where in the context.

Legend: S tokens of one sequence, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from statistics import fmean
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.data.store import encoded
from tokensieve.evals.evaluation import evaluating
from tokensieve.evals.progress import OnProgress
from tokensieve.model import DecoderForCausalLM
from tokensieve.tasks import Document, encoder, stable_fraction

HEAD_ROWS = 1024  # positions whose logits are held at a time


@dataclass(frozen=True)
class Texts(Sequence[Tensor]):
    """Sequences of token ids (S) int64, and the number of the document that each is a stretch of."""

    sequences: tuple[Tensor, ...]
    documents: tuple[int, ...]

    @overload
    def __getitem__(self, place: int) -> Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> "Texts": ...
    def __getitem__(self, place: int | slice) -> "Tensor | Texts":
        if isinstance(place, int):
            return self.sequences[place]
        return Texts(self.sequences[place], self.documents[place])

    def __len__(self) -> int:
        return len(self.sequences)


def documents_of(sequences: Sequence[Tensor]) -> tuple[int, ...]:
    """The number of each sequence's document; sequences that are not `Texts` are each of a document of their own."""
    return sequences.documents if isinstance(sequences, Texts) else tuple(range(len(sequences)))


def text_sequences(tokenizer: Any, documents: Iterable[Document], context: int, count: int) -> Texts:
    """`count` int64 sequences of exactly `context` tokens: bos, then consecutive tokens of a single document each.

    A tokenizer without bos begins with the document's first token. A document gives its first stretch; later ones too
    only if there are too few documents. Their order is drawn by a hash of the names.

    Raises:
        UserError: the documents do not hold so much text.
    """
    encode = encoder(tokenizer)
    length = context - len(encode.begin)
    drawn = sorted(documents, key=lambda d: stable_fraction("sequence " + d.name))
    long = list(islice((ids for _, ids in encoded(drawn, encode) if len(ids) >= length), count))
    sequences: list[tuple[Tensor, int]] = []
    stretch = 0
    while len(sequences) < count:
        pieces = enumerate(ids[stretch * length : (stretch + 1) * length] for ids in long)
        whole = [(torch.tensor([*encode.begin, *piece]), number) for number, piece in pieces if len(piece) == length]
        if not whole:
            raise UserError(
                f"the held-out documents hold {len(sequences)} stretches of {context} tokens, not {count}; "
                "ask for fewer or shorter ones, or raise held_out_share"
            )
        sequences += whole
        stretch += 1
    texts, numbers = zip(*sequences[:count], strict=True) if count > 0 else ((), ())
    return Texts(texts, numbers)


def token_losses(model: DecoderForCausalLM, ids_S: Tensor) -> Tensor:
    """Cross-entropy in nats (S - 1,), float32 on the CPU: the first of `predictions`. Errors are its own."""
    return predictions(model, ids_S)[0]


def predictions(model: DecoderForCausalLM, ids_S: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats, float32, and the likeliest tokens, int64, both (S - 1,) and on the CPU: entry i is that of
    token i + 1, predicted from the i + 1 tokens before it.

    The logits of `HEAD_ROWS` positions exist at a time.

    Raises:
        UserError: a loss is not finite.
    """
    device = model.lm_head.weight.device
    ids = ids_S.to(device)
    with evaluating(model):
        hidden = model.model(input_ids=ids[None]).last_hidden_state[0, :-1]
        parts = []
        for h, target in zip(hidden.split(HEAD_ROWS), ids[1:].split(HEAD_ROWS), strict=True):
            logits = model.lm_head(h).float()
            parts.append((F.cross_entropy(logits, target, reduction="none"), logits.argmax(-1)))
    losses, best = (torch.cat(kind).cpu() for kind in zip(*parts, strict=True))
    if not bool(losses.isfinite().all()):
        raise UserError("the model's logits are not finite; are its weights damaged, or too large for their dtype?")
    return losses, best


@dataclass(frozen=True)
class Perplexity:
    """`ppl`: exp of the mean loss at positions that see more than k tokens, where there is something to select;
    `ppl_all`: at all positions.

    `loss_by_text[j][i]`: mean in nats, in text j, of the positions with edges[i] < tokens seen <= edges[i + 1].
    `tokens`: number of losses that `ppl` is the mean of. `by_text`: their mean in each text, all of the same length.
    `documents`: the number of each text's document; None (in files of before 2026-11-30): not known.
    """

    ppl: float
    ppl_all: float
    edges: tuple[int, ...]
    loss_by_text: tuple[tuple[float, ...], ...]
    tokens: int
    by_text: tuple[float, ...]
    documents: tuple[int, ...] | None = None

    def ppl_of(self, texts: int) -> float:
        """`ppl` of the first so many texts."""
        return math.exp(fmean(self.by_text[:texts]))

    def loss_of(self, texts: int) -> list[float]:
        """The loss by position, in nats, of the first so many texts."""
        return [fmean(stretch) for stretch in zip(*self.loss_by_text[:texts], strict=True)]

    def by_position(self) -> list[tuple[float, ...]]:
        """The losses of the texts, in nats, in each stretch between two edges."""
        return list(zip(*self.loss_by_text, strict=True))

    def less(self, other: "Perplexity") -> list[list[float]]:
        """The losses of the texts in each stretch less those of `other`, which read the same texts.

        Raises:
            ValueError: the two do not have the same edges and number of texts.
        """
        if self.edges != other.edges or len(self.by_text) != len(other.by_text):
            raise ValueError(f"stretches {self.edges} and {other.edges} are not those of the same texts")
        pairs = zip(self.by_position(), other.by_position(), strict=True)
        return [[x - y for x, y in zip(a, b, strict=True)] for a, b in pairs]


def perplexity(
    model: DecoderForCausalLM,
    sequences: Sequence[Tensor],
    top_k: int,
    buckets: int = 16,
    on_progress: OnProgress | None = None,
) -> Perplexity:
    """Perplexity of held-out sequences (equally long, one document each), and the loss by position in `buckets` equal
    stretches.

    Raises:
        UserError: no sequences, of different lengths, or none longer than k.
    """
    if not sequences or len({len(s) for s in sequences}) > 1:
        raise UserError("perplexity needs at least one sequence, and all of one length; take them from text_sequences")
    context = len(sequences[0])
    if context - 1 <= top_k:
        raise UserError(
            f"sequences of {context} tokens never see more than k = {top_k} keys: nothing is selected; use longer ones"
        )
    rows = []
    for done, ids in enumerate(sequences, 1):
        rows.append(token_losses(model, ids))
        if on_progress is not None:
            on_progress("text", done, len(sequences))
    return perplexity_of(torch.stack(rows), top_k, buckets, documents_of(sequences))


def perplexity_of(
    losses: Tensor, top_k: int, buckets: int = 16, documents: tuple[int, ...] | None = None
) -> Perplexity:
    """Perplexity from the losses in nats (texts, S - 1) of equally long sequences; otherwise as `perplexity`."""
    losses, context = losses.double(), losses.shape[1] + 1
    buckets = min(buckets, context - 1)
    edges = [round(i * (context - 1) / buckets) for i in range(buckets + 1)]
    selected = losses[:, top_k:]
    return Perplexity(
        ppl=math.exp(float(selected.mean())),
        ppl_all=math.exp(float(losses.mean())),
        edges=tuple(edges),
        loss_by_text=tuple(tuple(float(row[a:b].mean()) for a, b in pairwise(edges)) for row in losses),
        tokens=selected.numel(),
        by_text=tuple(selected.mean(1).tolist()),
        documents=documents,
    )
