"""Requests to the engine, and its outputs."""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from tokensieve.config import UserError
from tokensieve.engine.trace import LayerTrace

Finish = Literal["stop", "length", "abort", "error"]
MOST_STOPS, LONGEST_STOP = 64, 1024  # stop strings of a request, and characters of each
MOST_LOGPROBS = 20  # alternatives returned beside a token
MOST_BIASES = 1024  # tokens in the logit_bias of a request
COLDEST = 0.001  # the lowest temperature besides 0: division by a lower one makes logits infinite


@dataclass(frozen=True)
class Sampling:
    """Rules for the choice of the next token, and for the end of a request.

    The penalties, the biases and the grammar change the logits first; the temperature and the cuts apply to the result.

    max_tokens: limit of the answer in tokens. 0 runs the prompt alone.
    min_tokens: the answer does not end, by an end token or a stop string, before it has so many tokens. Exclusive with
        `schema` and `grammar`.
    temperature: 0 takes the likeliest token, the first of equal ones. Otherwise logits are divided by it.
    top_k: only the `top_k` largest probabilities are kept. 0 keeps all.
    top_p: of those, only the fewest that together reach `top_p` are kept.
    min_p: of those, only the ones of at least `min_p` times the largest are kept.
    repetition_penalty: divides positive logits of tokens in the prompt or the answer, and multiplies negative ones.
    presence_penalty: subtracted once from the logit of every token in the answer.
    frequency_penalty: subtracted once for every occurrence of a token in the answer.
    logit_bias: pairs of a token and a number, which is added to the token's logit.
    seed: the same seed gives the same draws, whatever else runs. None: the engine picks one.
    stop: strings at which the answer ends. The string itself is left out of it.
    detokenize: whether outputs have text. Without it there are no `stop` strings.
    ignore_eos: whether the answer goes on after an end token.
    logprobs: number of alternatives returned beside the natural log probability of every token. The log probabilities
        are the model's, before any of the above. None returns none of them.
    prompt_logprobs: the same for the tokens of the prompt, all of which are run then: none is taken from the cache.
    schema: JSON schema that the answer obeys.
    grammar: grammar that the answer obeys, in llguidance's variant of Lark. Exclusive with `schema`.

    Raises UserError for values outside of these ranges.
    """

    max_tokens: int = 256
    min_tokens: int = 0
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
    detokenize: bool = True
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    schema: dict[str, Any] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        limits = {
            "max_tokens": (self.max_tokens >= 0, "0 or more"),
            "min_tokens": (0 <= self.min_tokens <= self.max_tokens, f"between 0 and max_tokens, {self.max_tokens}"),
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
            **{
                name: (count is None or 0 <= count <= MOST_LOGPROBS, f"between 0 and {MOST_LOGPROBS}")
                for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs))
            },
            "seed": (self.seed is None or 0 <= self.seed < 1 << 64, "between 0 and 2^64 - 1"),
        }
        for name, (holds, range_) in limits.items():
            if not holds:  # NaN is in no range
                raise UserError(f"{name} is {getattr(self, name)}; it must be {range_}")
        if len(self.logit_bias) > MOST_BIASES or not all(t >= 0 and -100 <= b <= 100 for t, b in self.logit_bias):
            raise UserError(f"logit_bias takes up to {MOST_BIASES} tokens, each with a number between -100 and 100")
        if self.schema is not None and self.grammar is not None:
            raise UserError("schema and grammar exclude each other; leave one out")
        if self.min_tokens and not (self.schema is self.grammar is None):
            raise UserError("min_tokens excludes a schema and a grammar, which say where an answer ends; leave one out")
        if self.stop and not self.detokenize:
            raise UserError("stop strings are found in the text, which detokenize=False leaves out; leave one out")
        if len(self.stop) > MOST_STOPS or any(not 0 < len(s) <= LONGEST_STOP for s in self.stop):
            raise UserError(f"stop takes up to {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters")


@dataclass(frozen=True)
class Request:
    """One prompt, to be answered.

    id: name of the request, unique among those that have not ended.
    prompt: tokens, at least one.
    sampling: how tokens are chosen, and when the answer ends.
    selector: what selects keys: "indexer", "dense" for attention to every key of the same model, any other name that
        `tokensieve.selecting` takes (`module:function` too), or a name under which the engine was given a function.
    trace: whether the first output brings a record of what the prompt's last token attended to.
    progress: whether outputs before the first token report how much of the prompt has been read.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    selector: str = "indexer"
    trace: bool = False
    progress: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log probability of a token under the model.

    token: the token.
    logprob: its log probability.
    top: pairs of token and log probability for the likeliest alternatives, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """Result of one step for a request.

    id: id of the request.
    text: new text. May be empty while the rest of a character or of a stop string may still follow. Always empty
        without `detokenize`.
    tokens: new tokens.
    logprobs: one per new token, if they were requested.
    prompt_logprobs: with the first output, one per token of the prompt, if they were requested. The first token has
        none.
    finish: why the request ended; None while it runs.
    prompt_tokens: tokens of the prompt.
    read_tokens: tokens of the prompt that were read so far, including those found in the cache.
    cached_tokens: tokens of the prompt that were found in the cache.
    completion_tokens: tokens of the answer so far.
    error: message, if finish is "error".
    refused: whether the error lies in the request: it needs something that cannot be done, and would end so again.
    trace: one record per layer, with the first token, if it was requested.
    selection: with the last output, if the engine keeps it: parts (layers, t, k) int32 one behind the other, the
        positions that each token of prompt and answer read, ascending, then -1. The first part is the prompt's, and
        the same tensor for all requests that shared it whole. The last token has none, since it was not run.
    """

    id: str
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish: Finish | None = None
    prompt_tokens: int = 0
    read_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""
    refused: bool = False
    trace: tuple[LayerTrace, ...] = ()
    selection: tuple[Tensor, ...] = ()

    @property
    def reading(self) -> bool:
        """Whether the prompt is still being read. Such an output has neither tokens nor text."""
        return self.finish is None and self.read_tokens < self.prompt_tokens
