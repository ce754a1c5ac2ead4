"""Requests to the engine. Nothing else in `serve` knows how the engine names the two kinds of attention."""

from dataclasses import replace

from tokensieve.engine import Request, Sampling

DENSE = "dense"


def engine_request(id: str, prompt: tuple[int, ...], sampling: Sampling, selector: str, trace: bool = False) -> Request:
    """selector: who selects keys. trace: the first output reports what the prompt's last token attended to."""
    return Request(id, prompt, sampling, selector=selector, trace=trace)


def attention_of(request: Request) -> str:
    """The kind of attention, as the log names it."""
    return request.selector


def with_other_attention(request: Request, id: str, sparse: str) -> Request:
    """The same request under another id, dense if it was sparse, and by the selector `sparse` if it was dense."""
    return replace(request, id=id, selector=sparse if request.selector == DENSE else DENSE)
