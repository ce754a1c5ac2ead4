"""The tokenizer beside a checkpoint, in any format that transformers reads, and tiktoken files as Kimi ships them.

Code of a folder is never run. Where a format needs such code, the refusal says how to convert it.
"""

import json
from pathlib import Path
from typing import Any

from tokensieve import checkpoint
from tokensieve.config import UserError
from tokensieve.families import ModelConfig
from tokensieve.files import refuse_pointer
from tokensieve.model.files import model_path

SINGLE, SETTINGS, TIKTOKEN = "tokenizer.json", "tokenizer_config.json", "tiktoken.model"
_FORMS = (SINGLE, "tokenizer.model", TIKTOKEN, "*.tiktoken", "vocab.*", "*.model")  # the first that is there is read

# How Moonlight's and Kimi's vocabulary cuts a text before any bytes are merged: Chinese apart from other scripts, words
# with the character before them, up to three digits, punctuation with the line's end, and white space.
_CAPITAL, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE, _SHORT = r"[^\r\n\p{L}\p{N}]?", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_PIECES = "|".join(
    (
        r"[\p{Han}]+",
        f"{_BEFORE}{_CAPITAL}*{_SMALL}+{_SHORT}",
        f"{_BEFORE}{_CAPITAL}+{_SMALL}*{_SHORT}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
KIMI_CLASS = "TikTokenTokenizer"  # its name in tokenizer_config.json
KIMI_RESERVED = 256  # ids after the vocabulary, whether they are named or not


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a checkpoint, as transformers reads it; it has a `backend_tokenizer` of the package tokenizers.

    `name`: as for `load`, a GGUF file included. Read are tokenizer.json, SentencePiece's tokenizer.model, vocab.json
    with merges.txt, and the tiktoken.model of Moonlight and Kimi. UserError if there is none, if it is damaged, or if
    it needs a package that is missing or code of its own.
    """
    folder = model_path(name)
    try:
        tokenizer = checkpoint.gguf.read_tokenizer(folder) if checkpoint.gguf.is_gguf(folder) else _read(folder)
    except ImportError as error:
        raise UserError(
            f"{folder}: the tokenizer needs a package that is not installed ({_line(error)}); "
            "pip install 'tokensieve[sentencepiece]'"
        ) from error
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        for path in sorted(folder.glob("*.json")):
            refuse_pointer(path)
        raise UserError(f"{folder}: the tokenizer cannot be read ({_line(error)}); copy it again") from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(
            f"{folder}: transformers reads this tokenizer as {type(tokenizer).__name__}, in plain Python, which is not "
            "supported; use a checkpoint with a tokenizer.json"
        )
    return tokenizer


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _read(folder: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

    file = next((file for form in _FORMS for file in sorted(folder.glob(form))), None)
    if file is None:
        raise UserError(f"{folder}: no tokenizer.json; copy the tokenizer files of the original checkpoint into it")
    settings = _settings(folder)
    if file.name == TIKTOKEN and settings.get("tokenizer_class") == KIMI_CLASS:
        return _kimi(folder, settings)
    if file.name == SINGLE and settings.get("auto_map"):  # names code that tokenizer.json does without
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if file.suffix == ".tiktoken" or file.name == TIKTOKEN or settings.get("auto_map"):
        raise UserError(
            f"{folder}: its tokenizer is {file.name}, read by Python code of its own, which is never run; if you trust "
            "it, write a tokenizer.json with transformers (AutoTokenizer.from_pretrained(folder, "
            "trust_remote_code=True), then convert_slow_tokenizer)"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except StrictDataclassError:  # transformers' config refuses models that ours allows, as those without q_lora_rank
        return AutoTokenizer.from_pretrained(folder, config=PreTrainedConfig(), trust_remote_code=False)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    settings = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{SETTINGS} holds no object")
    return settings


def _kimi(folder: Path, settings: dict[str, Any]) -> Any:
    """The tokenizer of a tiktoken.model (lines of base64 and rank) and of the names in tokenizer_config.json.

    The ids after the ranks are special tokens, under their names in `added_tokens_decoder` or reserved.
    Source: tokenization_moonshot.py of Moonlight-16B-A3B, tokenization_kimi.py of Kimi-K2.
    """
    from base64 import b64decode

    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:  # theirs needs the package tiktoken
            pairs = (line.split() for line in Path(tiktoken_url).read_bytes().splitlines() if line)
            return {b64decode(token): int(rank) for token, rank in pairs}

    file = folder / TIKTOKEN
    first = len(Converter.load_tiktoken_bpe(str(file)))
    named = {int(number): token["content"] for number, token in settings.get("added_tokens_decoder", {}).items()}
    outside = [number for number in named if not first <= number < first + KIMI_RESERVED + 2]
    if outside:
        raise ValueError(
            f"{TIKTOKEN} holds {first} tokens, and {SETTINGS} names a special token {outside[0]}, "
            "far from its end: truncated, or of another model"
        )
    count = max(first + KIMI_RESERVED, max(named, default=0) + 1)
    special = [named.get(number, f"<|reserved_token_{number}|>") for number in range(first, count)]
    raw = Converter(str(file), KIMI_PIECES, extra_special_tokens=special).converted()
    template = folder / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    names = {key: settings[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token") if settings.get(key)}
    plain = {key: token["content"] if isinstance(token, dict) else token for key, token in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, chat_template=chat, clean_up_tokenization_spaces=False, name_or_path=str(folder), **plain
    )


def check_tokenizer(tokenizer: Any, config: ModelConfig) -> None:
    """UserError if the tokenizer has tokens that the model's embedding lacks."""
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's vocabulary is {config.vocab_size}; "
            "use the checkpoint's own tokenizer"
        )
