"""tokensieve: DeepSeek Sparse Attention for DeepSeek, Llama, Mistral and Qwen models: make them sparse, train, measure.

Names are resolved when first used, so that `from tokensieve import ops` loads torch and the operators and nothing else.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokensieve import ops
    from tokensieve.config import UserError
    from tokensieve.families import SparseConfig
    from tokensieve.model import LatentCache, join, load, load_tokenizer, save, selecting, share, sparsify
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
    "share",
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
    "share": "tokensieve.model",
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


# transformers' Auto classes open a `llama_dsa` folder once `tokensieve.model` is loaded, which takes seconds. So it is
# loaded when a program loads the Auto classes, and not before.
_AUTO_CLASSES = "transformers.models.auto.modeling_auto"


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if _half_loaded():
            configs = importlib.import_module("transformers.models.auto.configuration_auto")
            for mapping in (configs.CONFIG_MAPPING, module.MODEL_FOR_CAUSAL_LM_MAPPING):
                mapping._extra_content = _Later(mapping._extra_content)
        elif "tokensieve.model" not in sys.modules:  # else it is being loaded, and registers itself at its end
            importlib.import_module("tokensieve.model")


class _Later(dict[Any, Any]):
    """What is registered with a mapping of transformers, which loads `tokensieve.model` when somebody looks into it."""

    def __contains__(self, key: object) -> bool:
        if "tokensieve.model" not in sys.modules and not _half_loaded():
            importlib.import_module("tokensieve.model")
        return super().__contains__(key)


def _half_loaded() -> bool:
    """Whether one of transformers' models is being imported: it may load the Auto classes for its docstrings, and
    `tokensieve.model` would not find it yet.
    """
    models = [module for name, module in sys.modules.items() if name.startswith("transformers.models.")]
    specs = [module.__spec__ for module in models if not module.__name__.startswith("transformers.models.auto")]
    return any(getattr(spec, "_initializing", False) for spec in specs)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == _AUTO_CLASSES else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


if _AUTO_CLASSES in sys.modules:
    importlib.import_module("tokensieve.model")
else:
    sys.meta_path.insert(0, _Finder())
