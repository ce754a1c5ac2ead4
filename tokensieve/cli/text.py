"""Commands that write text with a model."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokensieve.cli.program import Command, Device, Model, Selection, app, check_selection, held_log, tokenizer_of

if TYPE_CHECKING:
    from torch import Tensor

    from tokensieve.engine import Engine, Sampling
    from tokensieve.model import DecoderForCausalLM


@app.command(cls=Command, context_settings={"allow_extra_args": True})
def generate(
    context: typer.Context,
    model: Model = "base",
    prompt: Annotated[str | None, typer.Option(help="Text to continue; - reads standard input.")] = None,
    chat: Annotated[str | None, typer.Option(help="A message to answer in chat format; - reads it.")] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="Talk: messages from standard input.")] = False,
    input_file: Annotated[Path | None, typer.Option(help="Answer all messages in it; blank lines part them.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 256,
    selection: Selection = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws when the temperature is not 0.")] = 0,
    device: Device = "auto",
) -> None:
    """Write text with a model, token by token, to standard output.

    Example: tokensieve generate base --prompt "def parse_args(argv):" --max-new-tokens 64
    """
    from tokensieve.config import UserError
    from tokensieve.files import known_folder

    if context.args:
        raise UserError(f"{' '.join(context.args)!r} has no option in front of it; write --prompt TEXT or --chat TEXT")
    if sum((prompt is not None, chat is not None, interactive, input_file is not None)) != 1:
        raise UserError("give one of --prompt TEXT, --chat TEXT, --interactive and --input-file FILE")
    known_folder(model)
    talk = interactive or input_file is not None
    text = _read(input_file) if input_file else ""
    if "-" in (prompt, chat):
        text = _read(None)
    from tokensieve.engine.tensor_parallel import load_rank
    from tokensieve.mesh import join_mesh
    from tokensieve.model.selection import resolve

    resolve(selection or "indexer")  # before the model is read
    with join_mesh(device) as mesh:
        if mesh.size > 1 and not talk:
            raise UserError("torchrun goes with --interactive and --input-file only; use one of them")
        loaded = load_rank(model, mesh)
        check_selection(selection, model, loaded)
        tokenizer = tokenizer_of(model, loaded)
        if talk:
            from tokensieve.cli import terminal
            from tokensieve.engine import EngineConfig, Sampling, engine_on

            prompts = terminal.prompts_in(text) if input_file else []
            # the cache has room for no more than is asked at once
            config = EngineConfig(running=min(max(len(prompts), 1), EngineConfig.running))
            sampling = Sampling(max_tokens=max_new_tokens, temperature=temperature, seed=seed)
            with engine_on(mesh, loaded, tokenizer, config) as engine:
                if engine is not None:
                    _talk(engine, sampling, prompts, selection or "indexer")
            return
        ids = _prompt_ids(tokenizer, text or prompt or chat or "", as_chat=chat is not None)
        _write(loaded, tokenizer, ids, max_new_tokens, selection, temperature, seed)


def _read(path: Path | None) -> str:
    """A file, or standard input."""
    from tokensieve.config import UserError

    try:
        return (path.read_bytes() if path else sys.stdin.buffer.read()).decode("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path or 'standard input'} is not UTF-8 ({error.reason}); convert it") from error


def _write(
    model: "DecoderForCausalLM",
    tokenizer: Any,
    ids: list[int],
    tokens: int,
    selection: str | None,
    temperature: float,
    seed: int,
) -> None:
    import torch
    from transformers import LogitsProcessorList, TextStreamer

    import tokensieve
    from tokensieve.model.positions import check_positions
    from tokensieve.tasks import end_tokens

    what = f"{len(ids)} prompt tokens and {tokens} new ones are"
    check_positions(model.config.max_position_embeddings, len(ids) + tokens, what, "shorten one")
    torch.manual_seed(seed)
    draw = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    ends = {
        "eos_token_id": sorted(end_tokens(model, tokenizer)) or None,
        "pad_token_id": tokenizer.pad_token_id or tokenizer.eos_token_id,
    }
    with torch.inference_mode(), held_log(), tokensieve.selecting(model, selection or "indexer"):
        model.generate(
            torch.tensor([ids], device=model.device),
            max_new_tokens=tokens,
            logits_processor=LogitsProcessorList([_finite]),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **draw,
            **ends,
        )


def _finite(ids: "Tensor", logits: "Tensor") -> "Tensor":
    """The logits as they are, for `generate` of transformers. UserError if one is not finite."""
    from tokensieve.config import UserError

    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite; are its weights damaged, or too large for their dtype?")
    return logits


def _talk(engine: "Engine", sampling: "Sampling", prompts: list[str], selector: str) -> None:
    """The answers to prompts; without prompts a conversation."""
    from tokensieve.cli import terminal

    if prompts:
        for asked, answer in terminal.answer_all(engine, prompts, sampling, selector):
            typer.echo(f"Prompt: {asked}\nCompletion: {answer}\n")
        return
    from tokensieve.cli.keyboard import read_message

    terminal.converse(
        engine,
        sampling,
        selector,
        read_message if sys.stdin.isatty() else input,
        lambda part: typer.echo(part, nl=False),
        lambda line: typer.echo(line, err=True),
    )


def _prompt_ids(tokenizer: Any, text: str, as_chat: bool) -> list[int]:
    from tokensieve.config import UserError
    from tokensieve.tasks.turns import prompt_ids

    if as_chat:
        return prompt_ids(tokenizer, [{"role": "user", "content": text}])
    first = tokenizer.bos_token_id
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    ids = ids if first is None or ids[:1] == [first] else [first, *ids]
    if not ids:
        raise UserError("--prompt is empty and the tokenizer has no first token; give some text")
    return ids
