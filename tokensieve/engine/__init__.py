"""The engine for one machine: many requests on one model, with paged caches.

- `request`: requests, sampling options and outputs.
- `core`: the engine itself; `config` has its settings.
- `scheduler`: which requests run next; `page_pool`: the pages they hold.
- `runner`: runs the model on the pages; `graphs` records decode steps on a GPU.
- `sampling`: chooses tokens; `grammar` restricts the choice; `detokenizer` turns tokens into text.
- `trace`: records what a token's attention read.
- `distributed`: one engine on several processes; `tensor_parallel` divides its model.
- `service`: many callers on the one thread of an engine.
"""

from tokensieve.engine.config import EngineConfig
from tokensieve.engine.core import Engine
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
