"""FLOPs, bytes, GPU-seconds and dollars of one token, against its position, in prefill and in decode.

A roofline of every operation: seconds = max(FLOPs / (share x peak), bytes / (share x bandwidth)). Operations run one
after the other, and their times add up. What experts exchange runs beside them (two micro-batches take turns), so a
token takes the longer of the two.

Legend: c context (the keys that a query sees, itself included), k selected keys. All figures of a group of GPUs are of
the group together, so that FLOPs and seconds of a token do not depend on how many there are, except for what they
repeat.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokensieve.config import UserError
from tokensieve.cost.forward import (
    attention_flops_per_key,
    index_bytes,
    index_flops_per_key,
    latent_bytes,
    scored_keys,
)
from tokensieve.cost.rates import Label, Rate, Rates
from tokensieve.cost.serving import (
    Serving,
    batch_size,
    cache_copies,
    exchange_bytes,
    reduced_bytes,
    step_weight_bytes,
)
from tokensieve.cost.shape import Shape, parameters

Phase = Literal["prefill", "decode"]
Bound = Literal["compute", "memory", "interconnect"]

BOUNDS: tuple[Bound, ...] = ("compute", "memory", "interconnect")
SMALLEST_SHARE = 0.005  # of a token's time, that a label is named for
SCORE_BYTES = 4  # an index score is written and read in float32


@dataclass(frozen=True)
class Part:
    """One operation of a token, in all layers. `label`: the origin of the share that bounds it."""

    name: str
    flops: float
    bytes: float
    seconds: float
    bound: Bound
    label: Label


@dataclass(frozen=True)
class Timed:
    """Operations one after the other, and beside them what GPUs exchange: the longer of the two takes the time."""

    parts: tuple[Part, ...]
    exchange: Part

    @property
    def seconds(self) -> float:
        return max(sum(part.seconds for part in self.parts), self.exchange.seconds)

    @property
    def bounding(self) -> tuple[Part, ...]:
        """The parts that the time is made of."""
        hidden = self.exchange.seconds <= sum(part.seconds for part in self.parts)
        return tuple(part for part in self.parts if part.seconds) if hidden else (self.exchange,)

    @property
    def bound(self) -> Bound:
        """The resource that takes most of the time."""
        return max(BOUNDS, key=lambda bound: sum(part.seconds for part in self.bounding if part.bound == bound))

    @property
    def label(self) -> str:
        """The label of the parts that the time is made of; if they differ, each with its share of the time."""
        shares = {
            label: sum(part.seconds for part in self.bounding if part.label == label) / self.seconds
            for label in dict.fromkeys(part.label for part in self.bounding)
        }
        shown = {label: share for label, share in shares.items() if share >= SMALLEST_SHARE}
        if len(shown) == 1:
            return next(iter(shown))
        return ", ".join(f"{shown[label]:.0%} {label}" for label in sorted(shown, key=shown.__getitem__, reverse=True))


@dataclass(frozen=True)
class TokenCost(Timed):
    """The cost of one token that sees `context` keys.

    Its seconds are GPU-seconds: the time of a step of a group, times its GPUs, over the tokens that it yields. batch:
    sequences that a group decodes together; None in prefill. exchange: what experts exchange, beside the parts.
    """

    phase: Phase
    sparse: bool
    context: int
    batch: int | None

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts)

    @property
    def bytes(self) -> float:
        """Of memory that is read or written; what goes between GPUs is not among them."""
        return sum(part.bytes for part in self.parts if part.bound != "interconnect")

    def usd_per_million(self, price: float) -> float:
        """Dollars for a million such tokens at `price` dollars a GPU hour."""
        return self.seconds / 3600 * price * 1e6


def prefill_cost(shape: Shape, serving: Serving, rates: Rates, position: int) -> TokenCost:
    """The cost of reading a prompt's token at `position` (from 0), in a chunk.

    Weights and cache are read once a chunk. (Neighbouring queries select nearly the same entries; what gathering them
    costs beyond that is in the measured share.) Sparse attention takes whichever is faster: masked MHA over all keys or
    MQA over the gathered ones. Up to k keys it is dense attention. The output head is for a prompt's last token alone,
    and is not counted.
    """
    c = _context(position)
    per_key = {mode: shape.layers * attention_flops_per_key(shape, mode) for mode in ("mha", "mqa")}
    cache = shape.layers * c * latent_bytes(shape, serving.cache) * cache_copies(shape, serving.tensor) / serving.chunk
    attend = _Roofline(serving, rates)

    def attention(name: str, flops: float, rate: Rate) -> Part:
        return attend.part(name, flops, serving.gpu.bf16, rate, cache, rates.memory)

    parts = [attend.products(shape, 1, 0, step_weight_bytes(shape, serving, serving.chunk) / serving.chunk)]
    if c <= shape.top_k or not shape.sparse:
        parts.append(attention("dense attention", c * per_key["mha"], rates.dense))
    else:
        masked = attention("masked attention", c * per_key["mha"], rates.masked)
        gathered = attention("gathered attention", shape.top_k * per_key["mqa"], rates.selected)
        parts += [min(masked, gathered, key=lambda part: part.seconds)]
        parts += attend.selection(shape, c, 1, 1 / serving.chunk)
    return attend.cost("prefill", shape, parts, c, None, 1)


def decode_cost(shape: Shape, serving: Serving, rates: Rates, position: int) -> TokenCost:
    """The cost of writing the token at `position` (from 0): its share of a step of its batch.

    Every sequence reads its own cache. Drafted tokens go through the model with it and read the same index keys and, if
    attention is dense, the same entries.
    """
    c, tokens = _context(position), serving.step_tokens
    shape = serving.drafting(shape)
    batch = batch_size(shape, serving, c)
    each = tokens / serving.accepted  # tokens that go through the model for one that is kept
    weights = step_weight_bytes(shape, serving, batch * tokens) / (batch * serving.accepted)
    keys = min(c, shape.top_k) if shape.sparse else c
    entry = shape.layers * latent_bytes(shape, serving.cache) * cache_copies(shape, serving.tensor)
    flops = each * keys * shape.layers * attention_flops_per_key(shape, "mqa")
    run = _Roofline(serving, rates)
    selects = shape.sparse and c > shape.top_k
    name, rate = ("gathered attention", rates.selected_decode) if selects else ("dense attention", rates.dense_decode)
    read = keys * entry * (tokens if selects else 1) / serving.accepted
    parts = [
        run.products(shape, each, 1 + (serving.draft > 0), weights),
        run.part(name, flops, serving.gpu.bf16, rate, read, rates.memory),
    ]
    if selects:
        parts += run.selection(shape, c, each, 1 / serving.accepted)
    return run.cost("decode", shape, parts, c, batch, each)


def _context(position: int) -> int:
    if position < 0:
        raise UserError(f"token position {position} is below 0; positions count from 0")
    return position + 1


@dataclass(frozen=True)
class _Roofline:
    """The parts of a token on these GPUs."""

    serving: Serving
    rates: Rates

    def part(self, name: str, flops: float, peak: float, rate: Rate, size: float, memory: Rate) -> Part:
        compute = flops / (peak * rate.share)
        reading = size / (self.serving.gpu.bandwidth * memory.share)
        if compute >= reading:
            return Part(name, flops, size, compute, "compute", rate.label)
        return Part(name, flops, size, reading, "memory", memory.label)

    def products(self, shape: Shape, tokens: float, heads: int, weights: float) -> Part:
        """Products with weights. heads: how often the output head is applied to a token."""
        counts, serving = parameters(shape), self.serving
        applied = counts.matmul + counts.indexer_matmul * serving.tensor + heads * counts.head
        peak = serving.gpu.fp8 if serving.weights == "fp8" else serving.gpu.bf16
        return self.part(
            "products with weights", 2 * tokens * applied, peak, self.rates.products, weights, self.rates.memory
        )

    def selection(self, shape: Shape, context: int, tokens: float, readers: float) -> Sequence[Part]:
        """Index scores, which every GPU of a group computes, and the search for the k best of them.

        tokens: whose scores are computed. readers: how often index keys are read.
        """
        serving, rates = self.serving, self.rates
        scores = shape.index_layers * serving.tensor * scored_keys(context, serving.two_level)
        peak = serving.gpu.fp8 if serving.index == "fp8" else serving.gpu.bf16
        read = readers * scores * index_bytes(shape, serving.index)
        flops = tokens * scores * index_flops_per_key(shape)
        return (
            self.part("index scores", flops, peak, rates.index, read, rates.memory),
            self.part("selection", 0, peak, rates.index, tokens * scores * SCORE_BYTES, rates.selection),
        )

    def cost(
        self,
        phase: Phase,
        shape: Shape,
        parts: Sequence[Part],
        context: int,
        batch: int | None,
        tokens: float,
    ) -> TokenCost:
        """The token's cost, with what goes between GPUs for the `tokens` tokens that go through the model for it."""
        rates, gpu = self.rates, self.serving.gpu
        reduced = tokens * reduced_bytes(shape, self.serving)
        if reduced:
            seconds = reduced / (gpu.link * rates.network.share)
            parts = [*parts, Part("sums over GPUs", 0, reduced, seconds, "interconnect", rates.network.label)]
        sent, bandwidth = exchange_bytes(shape, self.serving)
        seconds = tokens * sent / (bandwidth * rates.network.share)
        exchange = Part("exchange of experts", 0, tokens * sent, seconds, "interconnect", rates.network.label)
        return TokenCost(tuple(parts), exchange, phase, shape.sparse, context, batch)
