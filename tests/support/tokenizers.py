"""Small tokenizers in the manner of several families, and the files that they are shipped as."""

import base64
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BEGIN, END = "<s>", "</s>"
# Like Llama 2's, with spaces around the texts and an end that is no marker alone.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# Like Qwen's: every turn ends with a marker that is not eos, and thinking can be switched off.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Like Llama 3's: every turn ends with a marker of its own, and texts are stripped.
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_3_MARKERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


# Of Llama 3 and Qwen: a run of line ends is the end of its token. GPT-2's go on over the next line's indentation.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def bpe(texts: Iterable[str], *special: str, kind: str = "llama 3") -> Any:
    """A small tokenizer: byte-level as in Llama 3 or GPT-2, or with word marks and byte fallback as in Llama 2."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds

    if kind == "llama 2":
        tokenizer = Tokenizer(kinds.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first", split=True)]
        )
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
        special = ("<unk>", *special)
        alphabet = ["\n"]
    else:
        tokenizer = Tokenizer(kinds.BPE())
        split = pre_tokenizers.Split(Regex(PIECES), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt 2")
        tokenizer.pre_tokenizer = level if kind == "gpt 2" else pre_tokenizers.Sequence([split, level])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*texts, *(str(i) for i in range(2000))], trainer)
    return tokenizer


def fast(raw: Any, template: str | None = None, **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, **special)


def write_sentencepiece(texts: Iterable[str], folder: Path, template: str | None = None) -> Path:
    """tokenizer.model alone, as Llama 2 is shipped, and the settings beside it."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines()),
        model_writer=model,
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": BEGIN, "eos_token": END, "unk_token": "<unk>"}
    settings |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_vocab_and_merges(raw: Any, folder: Path, **settings: Any) -> Path:
    """vocab.json and merges.txt, as GPT-2 and Qwen 2 are shipped."""
    folder.mkdir(parents=True, exist_ok=True)
    raw.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_tiktoken(raw: Any, folder: Path, names: dict[int, str], **settings: Any) -> list[bytes]:
    """tiktoken.model and settings with `names` by their place after the vocabulary, as Kimi is shipped.

    Returns the vocabulary of `raw`, a byte-level BPE, by rank.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    words = [w for w, _ in sorted(raw.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])]
    special = {token.content for token in raw.get_added_tokens_decoder().values()}
    vocabulary = [bytes(byte_of[letter] for letter in word) for word in words if word not in special]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [base64.b64encode(word) + b" " + str(rank).encode() for rank, word in enumerate(vocabulary)]
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    first = len(vocabulary)
    named = {str(first + place): {"content": name, "special": True} for place, name in names.items()}
    raw_settings = {"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": named}
    raw_settings |= {"auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]}} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(raw_settings))
    (folder / "tokenization_moonshot.py").write_text("raise SystemExit('code of a folder was run')")
    return vocabulary
