"""Writes tokensieve's problems as verl's data: OUT/train.parquet and OUT/test.parquet. Runs where tokensieve does."""

from pathlib import Path
from typing import Annotated

import typer

import tokensieve
from tokensieve.config import UserError
from tokensieve.posttrain.verl import rows_of, write_rows
from tokensieve.tasks import END_THINK, encoder
from tokensieve.tasks.documents import Split
from tokensieve.tasks.problems import Mode, Problems, domain


def main(
    out: Path,
    tokenizer: Annotated[str, typer.Option(help="the model's folder, or a bundled name")],
    domains: Annotated[list[str], typer.Option("--domain", help="a name, FILE or module:object; may be repeated")],
    mode: Mode = "direct",
    language: str = "en",
    tokens: Annotated[int, typer.Option(help="of a prompt, at least: several times the model's k")] = 2048,
    rows: Annotated[int, typer.Option(help="of training, for each domain")] = 512,
    test_rows: int = 64,
    seed: int = 0,
) -> None:
    """Problems of some domains, in one mode, as verl's parquet files."""
    try:
        write(out, tokenizer, domains, mode, language, tokens, {"train": rows, "test": test_rows}, seed)
    except UserError as error:
        typer.echo(f"prompts.py: error: {error}", err=True)
        raise typer.Exit(2) from error


def write(
    out: Path, tokenizer: str, domains: list[str], mode: Mode, language: str, tokens: int, counts: dict[Split, int],
    seed: int,
) -> None:  # fmt: skip
    """UserError for what verl cannot honour, and as `domain` and `Problems` raise it."""
    known = tokensieve.load_tokenizer(tokenizer)
    if mode == "think" and END_THINK not in known.decode(known(END_THINK)["input_ids"], skip_special_tokens=True):
        raise UserError(
            f"{tokenizer}: {END_THINK} is a special token, which verl cuts out before it asks for a score, so no "
            "answer would seem to think; use --mode direct"
        )
    encode = encoder(known)
    for split, count in counts.items():
        found = []
        for name in domains:
            name = str(Path(name).resolve()) if Path(name).exists() else name
            task = Problems(domain(name), encode, mode, language, tokens)
            found += rows_of(name, task.examples(split, count, seed=seed), split)
        write_rows(out / f"{split}.parquet", found)


if __name__ == "__main__":
    typer.run(main)
