"""A byte-level BPE tokenizer for code, with chat markers and a chat template.

Digits are always single tokens (numbers can be copied digit by digit), runs of spaces stay together (indentation is
one token), and a token never reaches past the end of a line (so a line can be inserted between tokens).
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokensieve.config import UserError
from tokensieve.files import write_text
from tokensieve.tasks import ASSISTANT, BOS, END_THINK, EOS, PAD, THINK, USER

SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK, *(f"<｜reserved_{i}｜>" for i in range(7, 16)))

# In this order: a word with its space, punctuation with the line's end, blank lines, indentation, single spaces.
PIECES = r" ?[\p{L}_]+| ?[^\s\p{L}\p{N}_]+\n*|\p{N}|[^\S\n]*\n+|[^\S\n]+(?=[^\S\n])|\s"

# System text follows bos; every turn is marker, text, and for the assistant "no thinking" before and eos after it.
# There is no switch for thinking: no task trains a thought, so a model would never end one.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] }}"
    f"{{%- elif message['role'] == 'user' -%}}{{{{ '{USER}' + message['content'] }}}}"
    f"{{%- elif message['role'] == 'assistant' -%}}{{{{ '{ASSISTANT}{END_THINK}' + message['content'] + eos_token }}}}"
    "{%- else -%}{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{ '{ASSISTANT}{END_THINK}' }}}}{{%- endif -%}}"
)


def train_tokenizer(texts: Iterable[str], path: str | Path, vocab_size: int = 4096) -> Path:
    """Trains the tokenizer on texts (30 MB are plenty) and writes tokenizer.json and tokenizer_config.json to a folder.

    Ids 0 to 15 are the special tokens: bos, eos, pad, user, assistant, <think>, </think> and nine reserved ones.

    Args:
        texts: training text.
        path: a folder, made if missing.
        vocab_size: number of ids, special tokens and the 256 bytes included; at least 272.

    Raises:
        UserError: vocab_size is too small, or there is no text.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise UserError(f"vocab_size {vocab_size} is too small; 256 bytes and 16 special tokens need at least 272")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=16,
    )
    characters = 0

    def counted() -> Iterable[str]:
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if not characters:
        raise UserError("no text to train the tokenizer on; name a source that is not empty")
    folder = Path(path)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": CHAT_TEMPLATE,
    }
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return folder
