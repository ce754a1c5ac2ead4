"""Settings of `tokensieve eval`, as frozen dataclasses (see `tokensieve.config`)."""

from dataclasses import dataclass, field

from tokensieve.config import LongSizes, OwnSizes, ShortSizes, UserError


@dataclass(frozen=True)
class AgainstDenseSizes:
    """How much `tokensieve eval --suite parity` asks. Its tasks have the knobs of `LongSizes`."""

    context: int = 8192  # tokens of a prompt, all more than k
    times_k: int = 4  # lengthened to at least so many times the model's k tokens; 0: not lengthened
    top_k: tuple[int, ...] = ()  # keys that the sparse arms select; none: a quarter, half and all of the model's
    texts: int = 16  # held-out sequences
    written: int = 64  # tokens of the greedy continuation of each
    buckets: int = 16  # stretches of a sequence
    recall_queries: int = 128  # measured in each layer of each sequence
    tasks: tuple[str, ...] = ("single", "multikey", "multiquery")
    prompts: int = 64  # questions of each task
    ppl_loss: float = 0.01  # parity is perplexity of at most 1 + this times dense attention's
    task_loss: float = 0.03  # and scores of at most so much less

    def __post_init__(self) -> None:
        for name in ("context", "texts", "written", "buckets", "recall_queries", "prompts"):
            if getattr(self, name) < 1:
                raise UserError(f"parity.{name} is {getattr(self, name)}; it must be at least 1")
        if min(self.ppl_loss, self.task_loss) < 0:
            raise UserError("parity.ppl_loss and parity.task_loss are losses that parity allows; give 0 or more")


SERVING_PROBES = ("answers", "boundary", "repeat", "cached", "crowd", "ragged", "decode", "pieces", "dense")


@dataclass(frozen=True)
class ServingSizes:
    """How much `tokensieve eval --suite serving` asks an endpoint, and how long it waits."""

    model: str = ""  # id at the endpoint; empty: the first one that it serves
    dense: str = ""  # id of the same model with dense attention there; empty: MODEL:dense, if it is served
    contexts: tuple[
        int, ...
    ] = ()  # tokens of questions past k; none: around k, 8K, 32K, 128K, and as many as there are
    most: int = 0  # tokens of a question, at most; 0: as many as the model has room for
    probes: tuple[str, ...] = SERVING_PROBES
    questions: int = 16  # with known answers, in each context
    texts: int = 2  # compared, in each probe
    answer_tokens: int = 24  # of a known answer, at most
    generated: int = 24  # tokens that are compared
    crowd: int = 3  # texts beside the one that is compared
    tolerance: float = 0.1  # nats a token; rounding in bfloat16 stays far below
    seconds: float = 300.0  # for the whole of one reply
    retries: int = 4  # of a request that was refused because of its rate, or that failed on the way

    def __post_init__(self) -> None:
        unknown = [name for name in self.probes if name not in SERVING_PROBES]
        if unknown or not self.probes:
            raise UserError(f"serving.probes: {', '.join(unknown) or 'none'}; known are {', '.join(SERVING_PROBES)}")
        for name in ("questions", "texts", "answer_tokens", "generated", "crowd", "seconds", "retries", "tolerance"):
            if (getattr(self, name) < 1 and name not in ("retries", "tolerance")) or getattr(self, name) < 0:
                raise UserError(f"serving.{name} is {getattr(self, name)}; it is too small")


@dataclass(frozen=True)
class EvaluateConfig(OwnSizes):
    """`tokensieve eval`."""

    long: LongSizes = field(default_factory=LongSizes)
    short: ShortSizes = field(default_factory=ShortSizes)
    parity: AgainstDenseSizes = field(default_factory=AgainstDenseSizes)
    serving: ServingSizes = field(default_factory=ServingSizes)
