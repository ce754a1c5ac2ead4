"""Requests to the engine. Nothing else in `serve` knows how the engine names the two kinds of attention."""

from dataclasses import replace

from tokensieve.engine import Request, Sampling


def engine_request(id: str, prompt: tuple[int, ...], sampling: Sampling, dense: bool, trace: bool = False) -> Request:
    """dense: attention to every key. trace: the first output reports what the prompt's last token attended to."""
    return Request(id, prompt, sampling, selection="dense" if dense else "indexer", lens=trace)


def attention_of(request: Request) -> str:
    """The kind of attention, as the log names it."""
    return request.selection


def with_other_attention(request: Request, id: str) -> Request:
    """The same request under another id, dense if it was sparse and sparse if it was dense."""
    return replace(request, id=id, selection="indexer" if request.selection == "dense" else "dense")
