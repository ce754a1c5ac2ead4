"""The token ids that a conversation puts around its texts: DeepSeek's markers, or any tokenizer's chat template.

A template is taken apart instead of being asked for token ids: it is rendered with a placeholder for every text, and
the text between the placeholders is tokenized on its own. So a marker that is spelled out in somebody's text stays
ordinary text. The ids equal the template's own as long as no token spans a text and the template around it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from tokensieve.config import UserError
from tokensieve.tasks.time_limit import TimeIsUp, time_limit

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, END_THINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"  # of a tool, by an agent: `problems/tools.py`
DEEPSEEK = (BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK)

Message = Mapping[str, str]  # {"role": "system", "user" or "assistant", "content": text}
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Turns:
    """Token ids around the texts of a conversation:

        open user reply answer close  next user reply answer close  ...

    `open` includes bos. `reply` ends where the answer begins, without thinking. The last id of `close` ends an answer.
    """

    open: tuple[int, ...]
    reply: tuple[int, ...]
    close: tuple[int, ...]
    next: tuple[int, ...]


# What an expression of a template may raise, besides the errors of templates.
FAULTS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, MemoryError)

LONGEST = 10.0  # seconds that a template may take; they take milliseconds, and one that loops would never end


class EndlessTemplate(UserError):
    """A chat template that takes longer than `LONGEST`."""


def deepseek_turns(ids: Mapping[str, int]) -> Turns:
    """`ids`: of the markers `DEEPSEEK`."""
    return Turns((ids[BOS], ids[USER]), (ids[ASSISTANT], ids[END_THINK]), (ids[EOS],), (ids[USER],))


def deepseek_conversation(ids: Mapping[str, int], encode: Encode, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation: bos, and every message after its marker. System text follows bos without one."""
    before = {"system": (), "user": (ids[USER],), "assistant": (ids[ASSISTANT], ids[END_THINK])}
    prompt = [ids[BOS]]
    for message in messages:
        if message["role"] not in before:
            raise UserError(
                f"messages are of the roles system, user and assistant, not {message['role']}; convert them"
            )
        prompt += [*before[message["role"]], *encode(message["content"])]
        prompt += [ids[EOS]] if message["role"] == "assistant" else []
    return prompt


def plain_turns(encode: Encode, bos: int | None, eos: int | None) -> Turns:
    """For a tokenizer without a chat format: blank lines between turns, a line's end before an answer, eos after it."""
    begin = () if bos is None else (bos,)
    end = tuple(encode("\n")) if eos is None else (eos,)
    return Turns(begin, tuple(encode("\n")), end, tuple(encode("\n\n")))


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> str:
    """The text that the chat template writes for messages.

    The template sees a content that is None: some ask for it, and `apply_chat_template` of transformers leaves it out.
    options: `add_generation_prompt`, `continue_final_message`, and switches of the template.

    Raises:
        UserError: the tokenizer has no template, or one that is no valid template or refuses the messages;
            EndlessTemplate if it does not end.
    """
    from transformers.utils.chat_template_utils import render_jinja_template  # a second to import

    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the model's tokenizer has no chat template; ask without a chat (--prompt), or add chat_template.jinja"
        )
    try:
        template, known = tokenizer.get_chat_template(tools=tools), tokenizer.special_tokens_map
        with time_limit(LONGEST):
            (text,), _ = render_jinja_template([list(messages)], tools, chat_template=template, **known | options)
        return text
    except TimeIsUp as error:
        raise EndlessTemplate(
            f"the model's chat template does not end within {LONGEST:g} s; correct chat_template.jinja"
        ) from error
    except TemplateSyntaxError as error:
        raise UserError(
            f"the tokenizer's chat template is no valid template ({error.message}, line {error.lineno}); "
            "correct chat_template.jinja"
        ) from error
    except (TemplateError, *FAULTS) as error:
        raise UserError(f"the model's chat template refuses these messages: {' '.join(str(error).split())}") from error


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the answer begins. UserError as for `render`."""
    return list(tokenizer(render(tokenizer, messages, add_generation_prompt=True), add_special_tokens=False).input_ids)


def template_pieces(tokenizer: Any, messages: Sequence[Message], generate: bool) -> list[str]:
    """What the chat template puts before, between and after the messages' texts: one piece more than messages.

    `generate`: the last piece goes on to where an answer begins, without thinking if the template has a switch for it.

    Raises:
        UserError: the tokenizer has no template, or one that refuses these roles, fails, or changes their texts.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the tokenizer has no chat template; add chat_template.jinja beside its tokenizer.json, or ask for no "
            "chat: none in data.sources, and base.answers=0 in evaluations"
        )
    slots = [f"@@text {number}@@" for number in range(len(messages))]
    try:
        text = render(
            tokenizer,
            [{**message, "content": slot} for message, slot in zip(messages, slots, strict=True)],
            add_generation_prompt=generate,
            thinking=False,
            enable_thinking=False,
        )
    except UserError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the chat template cannot write {roles} ({error}); correct chat_template.jinja") from error
    if re.findall(r"@@text \d+@@", text) != slots:
        raise UserError("the chat template repeats, drops or changes a message's text; correct chat_template.jinja")
    return re.split(r"@@text \d+@@", text)


def template_turns(tokenizer: Any, encode: Encode, eos: int | None, special: set[int]) -> Turns:
    """`Turns` of a chat template. `encode` knows the special tokens, whose ids are `special`.

    An answer is closed by the first special token that the template puts after it, or by eos if there is none.

    Raises:
        UserError: the template cannot write a question, an answer and a second question, or does not end answers.
    """
    asked: list[Message] = [{"role": "user", "content": ""}]
    answered: list[Message] = [*asked, {"role": "assistant", "content": ""}]
    first, reply = (encode(piece) for piece in template_pieces(tokenizer, asked, generate=True))
    between = encode(template_pieces(tokenizer, [*answered, *asked], generate=False)[2])
    last = encode(template_pieces(tokenizer, answered, generate=False)[2])
    ends = [place + 1 for place, token in enumerate(last) if token in special]
    if ends:
        close = last[: ends[0]]
    elif eos is not None:
        close = [*last, eos]
    else:
        raise UserError("the chat template ends answers with no special token, and the tokenizer has no eos; add one")
    shared = close if ends else last
    if between[: len(shared)] != shared:
        raise UserError("the chat template ends the last answer otherwise than the others; correct chat_template.jinja")
    return Turns(tuple(first), tuple(reply), tuple(close), tuple(between[len(shared) :]))
