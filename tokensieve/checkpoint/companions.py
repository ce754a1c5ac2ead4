"""Files that go with a checkpoint's weights wherever these are written: tokenizer, chat template, generation settings.

A list of a tokenizer's files would age: transformers, vLLM and models with code of their own read tokenizer.model,
vocab.json and merges.txt, tiktoken.model beside a Python file, folders of templates, and what comes next. A file too
many does no harm, while a file too few is a tokenizer that cannot be read, or reads differently. So everything goes
along except what belongs to these weights alone, records of their training, and what is for readers.
"""

import json
import logging
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tokensieve.checkpoint import gguf
from tokensieve.config import UserError

log = logging.getLogger("tokensieve")

OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "*.npy", "*.npz")

_WEIGHTS = ("*.safetensors", *OTHER_WEIGHTS)
_OF_WEIGHTS = (*_WEIGHTS, "*.index.json", "config.json", "adapter_config.json", "quantize_config.json")
_OF_TRAINING = ("*.jsonl", "*state.json", "*results.json", "metrics.json", "details.json", "events.*")
_FOR_READERS = ("readme*", "*.md", "*.html", "*.pdf", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp")
_STAYS = (*_OF_WEIGHTS, *_OF_TRAINING, *_FOR_READERS, ".*", "__pycache__")
_PROGRAM = ("*.py", "*.jinja")
_OF_A_MODEL = ("vocab_size", "hidden_size", "num_hidden_layers")  # what no step from dense to sparse changes


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path.name.lower(), pattern) for pattern in patterns)


def is_companion(path: Path) -> bool:
    """Whether a file or folder of a checkpoint folder goes along.

    Folders do if they hold code or templates, as encoding/ of DeepSeek-V3.2 and additional_chat_templates/ of
    transformers, and no weights, as a trainer's checkpoints do.
    """
    if _matches(path, _STAYS):
        return False
    if not path.is_dir():
        return path.is_file()
    inside = list(path.rglob("*"))
    return any(_matches(p, _PROGRAM) for p in inside) and not any(_matches(p, _WEIGHTS) for p in inside)


def holds_another(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the checkpoint of a folder is another model than that of ``config``, by its size or its vocabulary.

    Such a model's tokenizer and card are not those of one that is saved in its place.
    """
    try:
        there = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(there, dict) and any(there.get(name) != config.get(name) for name in _OF_A_MODEL)


def copy_tokenizer(source: Path, folder: Path, replace: bool = False) -> None:
    """Copies the tokenizer, and all else that goes along, from one checkpoint folder into another.

    What is there already under the same name stays unless ``replace``. The tokenizer of a GGUF file is written as files
    of its own. If ``source`` is gone or its tokenizer cannot be read, a warning says so, and no weights are lost.
    """
    if gguf.is_gguf(source):
        try:
            gguf.save_tokenizer(source, folder)
        except UserError as error:
            log.warning("%s: without a tokenizer: %s", folder, error)
        return
    if not source.is_dir():
        log.warning("%s: without a tokenizer, since %s is gone; copy the tokenizer's files into it", folder, source)
        return
    for path in filter(is_companion, sorted(source.iterdir())):
        target = folder / path.name
        if target.exists() and not replace:
            continue
        if path.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(path, target, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(path, target)
