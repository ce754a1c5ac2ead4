"""tokensieve: DeepSeek Sparse Attention for DeepSeek and Llama models: make them sparse, train, measure.

Names are resolved when first used, so that `from tokensieve import ops` loads torch and the operators and nothing else.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokensieve import ops
    from tokensieve.config import UserError
    from tokensieve.families import SparseConfig
    from tokensieve.model import LatentCache, join, load, load_tokenizer, save, selecting, sparsify
    from tokensieve.train.callbacks import training

__all__ = [
    "LatentCache",
    "SparseConfig",
    "UserError",
    "join",
    "load",
    "load_tokenizer",
    "ops",
    "save",
    "selecting",
    "sparsify",
    "training",
]

__version__ = "0.1.0"

# Threads of GNU OpenMP, which torch uses on Linux, spin while they wait, by default for milliseconds: beside other busy
# processes that takes the very cores away that a step waits for. libgomp reads this once, when torch is loaded.
# Measured in docs/results/cpu.md, "Beside other processes".
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

_MODULE_OF = {
    "LatentCache": "tokensieve.model",
    "SparseConfig": "tokensieve.families",
    "UserError": "tokensieve.config",
    "join": "tokensieve.model",
    "load": "tokensieve.model",
    "load_tokenizer": "tokensieve.model",
    "save": "tokensieve.model",
    "selecting": "tokensieve.model",
    "sparsify": "tokensieve.model",
    "training": "tokensieve.train.callbacks",
}
_PACKAGES = ("checkpoint", "config", "cost", "data", "evals", "model", "ops", "tasks", "train")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"tokensieve.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'tokensieve' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
