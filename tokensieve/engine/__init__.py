"""The engine for one machine: many requests on one model, on caches in pages.

`request` says what is asked and what comes back, `core` is the engine; `scheduler` decides who runs, on which `pages`, `runner` runs the
model on them, `sampling` chooses tokens, `grammar` says which may be chosen, and `text` makes text of them. `trace` takes down what a token's
attention looked at. `distributed` runs one engine on several processes, `tensor_parallel` divides its model. `service` brings many callers to the one thread of an engine.
"""

from tokensieve.engine.core import Engine, EngineConfig
from tokensieve.engine.distributed import engine_on
from tokensieve.engine.request import Output, Request, Sampling, TokenLogprob
from tokensieve.engine.service import Busy, Service, Stopping

__all__ = [
    "Busy",
    "Engine",
    "EngineConfig",
    "Output",
    "Request",
    "Sampling",
    "Service",
    "Stopping",
    "TokenLogprob",
    "engine_on",
]
