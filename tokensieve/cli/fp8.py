"""`convert --fp8`: the folder, and what its rounding lost."""

from pathlib import Path
from typing import Any

import typer

from tokensieve.cli.program import stderr

TOKENS = 1024  # of the text that is predicted before and after
TEXT_BYTES = 4_000_000  # of sources from which the held-out text is taken


def convert_to_fp8(source: str, out: Path) -> None:
    """Writes the folder and prints the relative error of its weights, the perplexity of a short text before and after,
    and which programs cannot read it. The first two are also in its card."""
    from rich.markup import escape

    from tokensieve import checkpoint
    from tokensieve.config import UserError
    from tokensieve.families import model_config
    from tokensieve.model import model_path

    folder = model_path(source)
    with stderr().status("Reading headers") as status:
        lost = checkpoint.convert_to_blocks(folder, out, lambda name: status.update(f"Writing {escape(name)}"))
        kept = f", {lost.kept} were in blocks before and kept every bit" if lost.kept else ""
        typer.echo(f"{out}: {lost.matrices} matrices rounded to FP8 in blocks{kept}")
        if lost.matrices:
            error = f"{100 * lost.error:.2f}%, at most {100 * lost.worst:.2f}% ({lost.worst_name})"
            typer.echo(f"Relative error of the rounded weights: {error}")
            status.update("Measuring")
            try:
                before, after, tokens = _perplexities(folder, out)
                perplexity = f"Perplexity of {tokens} tokens of Python: {before:.4f} before, {after:.4f} after"
            except UserError as why:
                perplexity = f"Perplexity: not measured ({why})"
            typer.echo(perplexity)
            checkpoint.add_to_card(out, "FP8", [f"Relative error of the rounded weights: {error}", perplexity])
    for reason in checkpoint.exportable(model_config(checkpoint.read_config(out))):
        typer.echo(f"Cannot read it: {reason}")


def _perplexities(before: Path, after: Path) -> tuple[float, float, int]:
    """Perplexity of one held-out text under both folders, and its number of predicted tokens.

    UserError if the model does not fit into memory, or has no tokenizer here.
    """
    import math

    import psutil

    import tokensieve
    from tokensieve import checkpoint
    from tokensieve.data import read_documents
    from tokensieve.evals.losses import text_sequences, token_losses
    from tokensieve.families import model_config
    from tokensieve.machine import choose_device
    from tokensieve.model import check_tokenizer

    config = model_config(checkpoint.read_config(before))
    needed = 4 * sum(math.prod(shape) for shape in checkpoint.expected_tensors(config).values())
    free = psutil.virtual_memory().available
    if needed > 0.8 * free:
        raise tokensieve.UserError(
            f"the model takes {needed / 2**30:.0f} GiB here, of which {free / 2**30:.0f} are free; where it fits, "
            f"tokensieve eval {after} measures it"
        )
    tokenizer = tokensieve.load_tokenizer(before)
    check_tokenizer(tokenizer, config)
    context = min(TOKENS, config.max_position_embeddings)
    (text,) = text_sequences(tokenizer, read_documents("python", "test", limit_bytes=TEXT_BYTES), context, 1)

    def perplexity(folder: Path) -> float:
        model: Any = tokensieve.load(folder, device=choose_device())
        return math.exp(float(token_losses(model, text).mean()))

    return perplexity(before), perplexity(after), context - 1
