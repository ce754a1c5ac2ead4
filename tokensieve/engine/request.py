"""What a caller asks of the engine, and what it gets back."""

from dataclasses import dataclass, field
from typing import Any, Literal

from tokensieve.config import UserError
from tokensieve.engine.trace import LayerTrace

Finish = Literal["stop", "length", "abort", "error"]
MOST_STOPS, LONGEST_STOP = 64, 1024  # stop strings of a request, and characters of one
MOST_LOGPROBS = 20  # alternatives told beside a token
MOST_BIASES = 1024  # tokens of a request's logit_bias
COLDEST = 0.001  # temperature but 0: colder ones turn logits infinite


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when a request ends.

    temperature: 0 takes the likeliest token (of equal ones the first). Otherwise logits are divided by it, and of the probabilities only
    the `top_k` largest are kept (0: all), of these the fewest that together reach `top_p`, and of these the ones of at least
    `min_p` times the largest. repetition_penalty: logits of tokens that the prompt or the answer holds are divided by it where positive
    and multiplied where negative. From those that the answer holds presence_penalty is taken off, and frequency_penalty as often as it
    holds them; logit_bias, pairs of a token and a number, is added. seed: the same seed gives the same draws, whatever else runs; None:
    the engine takes one. stop: strings at which the answer ends, itself left out. logprobs: how many alternatives are told beside every
    token's own natural log probability, which is that of the model, before any of the above; None: none of it. The answer obeys a JSON
    schema, or a grammar in llguidance's kind of Lark, where one of them is given.
    Raises UserError for values outside of these ranges.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    schema: dict[str, Any] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        limits = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (
                self.temperature == 0 or COLDEST <= self.temperature <= 100,
                f"0, or between {COLDEST} and 100",
            ),
            "top_k": (0 <= self.top_k < 1 << 31, "0 (all) or more, below 2^31"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "between -2 and 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            "logprobs": (
                self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
                f"between 0 and {MOST_LOGPROBS}",
            ),
            "seed": (self.seed is None or 0 <= self.seed < 1 << 64, "between 0 and 2^64 - 1"),
        }
        for name, (holds, range_) in limits.items():
            if not holds:  # NaN is in no range
                raise UserError(f"{name} is {getattr(self, name)}; it must be {range_}")
        if len(self.logit_bias) > MOST_BIASES or not all(t >= 0 and -100 <= b <= 100 for t, b in self.logit_bias):
            raise UserError(f"logit_bias takes up to {MOST_BIASES} tokens, each with a number between -100 and 100")
        if self.schema is not None and self.grammar is not None:
            raise UserError("schema and grammar exclude each other; leave one out")
        if len(self.stop) > MOST_STOPS or any(not 0 < len(s) <= LONGEST_STOP for s in self.stop):
            raise UserError(f"stop takes up to {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters")


@dataclass(frozen=True)
class Request:
    """One prompt.

    selector: who selects keys: "indexer", "dense" for attention to every key of the same model, any other name that
    `tokensieve.selecting` takes (`module:function` too), or a name that the engine was given a function for.
    trace: what the prompt's last token looked at comes with the first output.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    selector: str = "indexer"
    trace: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural log probability under the model, and those of the likeliest alternatives, the likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """What a step added to a request. `text` may be empty while a character or a stop string may still be on its way."""

    id: str
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the cache
    completion_tokens: int = 0  # so far
    error: str = ""  # where finish is "error"
    refused: bool = False  # then: the request asked for what cannot be done, and asked again would end so again
    trace: tuple[LayerTrace, ...] = ()  # one per layer, with the first token, if the request asked for it
