"""How a model is served: GPUs, how they divide it, number formats, and the sequences that decode together.

Attention is divided over `tensor` GPUs, a group, and the groups attend for sequences of their own. Experts are divided
over all GPUs. What tensor parallelism repeats on every GPU of a group: the indexer with its keys, and the latent cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tokensieve.config import UserError
from tokensieve.cost.forward import (
    VALUE_BYTES,
    TwoLevel,
    decode_weight_bytes,
    index_bytes,
    index_weight_bytes,
    latent_bytes,
    stored_bytes,
)
from tokensieve.cost.gpus import NODE, Gpu
from tokensieve.cost.shape import Shape, parameters

Number = Literal["fp8", "bf16"]

USABLE = 0.9  # share of a GPU's memory for weights and cache; the rest is for activations
LARGEST_BATCH = 512  # sequences that decode together, if memory has room for more
NUMBERS: tuple[Number, ...] = ("fp8", "bf16")
DISPATCHED, COMBINED = 1, 2  # bytes of a number on its way to an expert (FP8) and back (bf16)


@dataclass(frozen=True)
class Serving:
    """A deployment of one phase, prefill or decode. UserError for sizes that do not go together.

    gpus: that the experts are divided over. tensor: that the attention of one sequence is divided over.
    weights, cache, index: formats of weights, of entries, and of index scores and keys.
    chunk: tokens of a prefill step on one group. batch: sequences that a group decodes together; None: as many as
    memory has room for, at most `LARGEST_BATCH`. mean_context: tokens of the other sequences of a batch; None: they
    stand where the token does. draft: tokens that a module of one layer drafts for each step, acceptance: the
    probability that one is right if those before it are.
    """

    gpu: Gpu
    gpus: int = 8
    tensor: int = 1
    weights: Number = "fp8"
    cache: Number = "fp8"
    index: Number = "fp8"
    chunk: int = 8192
    batch: int | None = None
    mean_context: int | None = None
    draft: int = 0
    acceptance: float = 0.85
    two_level: TwoLevel | None = None

    def __post_init__(self) -> None:
        for name in ("weights", "cache", "index"):
            if getattr(self, name) not in NUMBERS:
                raise UserError(f"{name} {getattr(self, name)!r} is unknown; use {' or '.join(NUMBERS)}")
        for name in ("gpus", "tensor", "chunk", "batch", "mean_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.gpus % self.tensor:
            raise UserError(f"{self.gpus} GPUs are no multiple of {self.tensor}, which attention is divided over")
        if self.gpus > NODE and self.gpus % NODE:
            raise UserError(f"{self.gpus} GPUs are no whole machines of {NODE}; take {NODE} or less, or a multiple")
        if self.tensor > NODE:
            raise UserError(f"attention over {self.tensor} GPUs leaves its machine; divide it over at most {NODE}")
        if self.draft < 0 or not 0 <= self.acceptance <= 1:
            raise UserError(f"{self.draft} drafted tokens, accepted with {self.acceptance}: no number and probability")

    @property
    def groups(self) -> int:
        return self.gpus // self.tensor

    @property
    def step_tokens(self) -> int:
        """Tokens of a sequence that go through the model in a step."""
        return 1 + self.draft

    @property
    def accepted(self) -> float:
        """Tokens of a sequence that a step yields in the mean."""
        return sum(self.acceptance**i for i in range(self.step_tokens))

    def drafting(self, shape: Shape) -> Shape:
        """The shape with the drafting module's layer, which is like the model's last one."""
        one = self.draft > 0
        return replace(
            shape,
            layers=shape.layers + one,
            moe_layers=shape.moe_layers + (one and shape.moe_layers > 0),
            index_layers=shape.index_layers + (one and shape.sparse),
        )


def cache_copies(shape: Shape, tensor: int) -> float:
    """Copies of a sequence's entries in a group of GPUs: latent ones are on every GPU, grouped ones are divided."""
    attention = shape.attention
    latent = attention.gathered != attention.masked
    groups = 1 if latent else attention.cached // attention.masked
    return tensor / min(tensor, groups)


def cache_bytes(shape: Shape, serving: Serving) -> float:
    """Bytes that one token takes in the caches of a whole group."""
    entries = shape.layers * latent_bytes(shape, serving.cache) * cache_copies(shape, serving.tensor)
    keys = shape.index_layers * index_bytes(shape, serving.index) * serving.tensor
    return entries + keys


def weight_bytes(shape: Shape, serving: Serving) -> float:
    """Bytes of weights on one GPU, in the formats of `stored_bytes`."""
    counts, number = parameters(shape), serving.weights
    active = shape.moe_layers * shape.experts_per_token * 3 * shape.hidden * shape.expert_ffn
    matrices = counts.matmul - counts.router - active
    plain = counts.total - counts.indexer - counts.routed - matrices - counts.router_bias
    divided = stored_bytes(number, matrices, plain, counts.router_bias)
    indexer = index_weight_bytes(shape, number) + stored_bytes(number, plain=counts.indexer - counts.indexer_matmul)
    return divided / serving.tensor + stored_bytes(number, counts.routed) / serving.gpus + indexer


def step_weight_bytes(shape: Shape, serving: Serving, tokens: float) -> float:
    """Bytes of weights that a whole group reads in a step of `tokens` tokens of its own: its share of the experts that
    all groups' tokens meet, and everything else once.
    """
    number = serving.weights
    fixed = decode_weight_bytes(shape, 0, number)
    experts = decode_weight_bytes(shape, tokens * serving.groups, number) - fixed
    repeated = (serving.tensor - 1) * index_weight_bytes(shape, number)
    return fixed + repeated + experts / serving.groups


def batch_size(shape: Shape, serving: Serving, context: int) -> int:
    """Sequences that a group decodes together. UserError if weights and cache do not fit into the GPUs' memory."""
    length = serving.mean_context or context
    gpu = serving.gpu
    room = serving.tensor * (USABLE * gpu.memory - weight_bytes(shape, serving))
    each = cache_bytes(shape, serving) * length
    fitting, wanted = int(room // each), serving.batch or 1
    if fitting < wanted:
        weights, caches, usable = (
            f"{x / 1e9:.3g} GB"
            for x in (weight_bytes(shape, serving), wanted * each / serving.tensor, USABLE * gpu.memory)
        )
        raise UserError(
            f"sequences that do not fit: {wanted} of {length:,} tokens; weights take {weights} and caches {caches} of "
            f"the {usable} of one {gpu.name} that can be used; divide the model over more GPUs (--gpus, --tensor)"
        )
    return serving.batch or min(fitting, LARGEST_BATCH)


def smallest(shapes: Sequence[Shape], serving: Serving, context: int) -> Serving:
    """`serving` with the fewest GPUs on which each shape decodes its batch, and one sequence of `context` tokens.

    Experts are divided over all of them; attention over several only if its weights or one cache need it. UserError if
    no number up to 128 machines is enough.
    """
    machines = [NODE * 2**i for i in range(1, 8)] if any(shape.experts for shape in shapes) else []
    for gpus in (1, 2, 4, 8, *machines):
        for tensor in (1, 2, 4, 8):
            if tensor > gpus or (gpus != tensor and not machines):
                continue
            tried = replace(serving, gpus=gpus, tensor=tensor)
            alone = replace(tried, batch=None, mean_context=None)
            if all(fits(tried.drafting(shape), each, context) for shape in shapes for each in (tried, alone)):
                return tried
    raise UserError(
        f"no number of {serving.gpu.name} holds this model with a sequence of {context:,} tokens; say --gpus"
    )


def fits(shape: Shape, serving: Serving, context: int) -> bool:
    """Whether weights and the batch's caches fit into the GPUs' memory."""
    try:
        return batch_size(shape, serving, context) > 0
    except UserError:
        return False


def exchange_bytes(shape: Shape, serving: Serving) -> tuple[float, float]:
    """Bytes that a token sends to experts on other GPUs and gets back, and the bandwidth of their way.

    Within one machine a copy goes to each GPU that has experts of the token, beyond it to each such machine. Routing is
    assumed uniform, as in `read_experts`.
    """
    bandwidth = serving.gpu.link if serving.gpus <= NODE else serving.gpu.network
    numbers = shape.moe_layers * shape.hidden * expert_copies(shape, serving.gpus)
    return numbers * (DISPATCHED + COMBINED), bandwidth


def expert_copies(shape: Shape, gpus: int) -> float:
    """Copies of a token that leave its GPU, within one machine, or its machine in each layer with experts, if these are
    divided over so many GPUs.
    """
    places = gpus if gpus <= NODE else gpus // NODE
    if not shape.experts:
        return 0.0
    return places * (1 - (1 - 1 / places) ** shape.experts_per_token) * (places - 1) / places


def reduced_bytes(shape: Shape, serving: Serving) -> float:
    """Bytes that a group sends to add up one token's partial sums, after attention and after MLPs without experts."""
    sums = shape.layers + (shape.layers - shape.moe_layers)
    return sums * 2 * (serving.tensor - 1) * shape.hidden * VALUE_BYTES["bf16"]
