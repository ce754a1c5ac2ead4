"""The command that takes indexers away from the layers that can do without."""

from pathlib import Path
from typing import Annotated

import typer

from tokensieve.cli.program import Config, Device, Model, Set, app, stderr, tokenizer_of, with_keys


@app.command(cls=with_keys("ShareConfig", "share", "tokensieve.share_config"))
def share(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder of the new checkpoint; must not hold one.")],
    keep: Annotated[int | None, typer.Option(min=1, help="Indexers that stay; which ones, the loss decides.")] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="0,2,...", help="Instead of --keep: the layers that keep their indexer.")
    ] = None,
    data: Annotated[str, typer.Option(help="Source of the text; its training part is used.")] = "python",
    held_out_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of --data that is held out, and not used.")
    ] = 0.02,
    config: Config = "share",
    set_: Set = None,
    device: Device = "auto",
) -> None:
    """Let the layers of a sparse model share indexers: those that lose theirs read the keys of the layer before them.

    One layer after the other gives its indexer up, each time the one whose loss of it costs the least. Nothing is
    trained. To train the indexers that stay on all of their layers: tokensieve warmup --config warmup-shared.

    Example: tokensieve share sparse runs/shared --keep 4
    """
    from tokensieve.config import UserError, load_config
    from tokensieve.files import check_free, check_source, known_folder
    from tokensieve.integers import read_integer
    from tokensieve.share_config import ShareConfig

    settings = load_config(ShareConfig, config, tuple(set_ or ()))
    if (keep is None) == (layers is None):
        raise UserError("say which indexers stay: how many with --keep, or which with --layers")
    try:
        named = None if layers is None else [read_integer(n) for n in layers.split(",")]
    except ValueError as error:
        raise UserError(f"--layers: {error}; write it as numbers of layers, for example 0,2,5") from error
    known_folder(model)
    check_free(out)
    check_source(data)
    import tokensieve
    from tokensieve.data import read_documents
    from tokensieve.evals import greedy_choice, text_sequences
    from tokensieve.machine import choose_device

    loaded = tokensieve.load(model, device=choose_device(device))
    kept = sorted({n for n in named or () if isinstance(n, int)})
    if keep is not None:
        tokenizer = tokenizer_of(model, loaded)
        with stderr().status("Reading the data") as status:
            documents = read_documents(data, "train", held_out_share)
            texts = text_sequences(tokenizer, documents, settings.context, settings.texts)

            def on_progress(what: str, done: int, total: int) -> None:
                status.update(f"Choosing: pass {done} of {total}")

            choice = greedy_choice(loaded, texts, keep, on_progress)
        typer.echo(f"loss {choice.loss:.4f} with an indexer in every layer")
        for step in choice.steps:
            typer.echo(f"loss {step.loss:.4f} ({step.loss - choice.loss:+.4f}) without that of layer {step.layer}")
        kept = [*choice.kept]
    tokensieve.save(tokensieve.share(loaded, kept), out)
    typer.echo(f"{out}: indexers in layers {', '.join(map(str, kept))}; the others read the keys of the layer before")
    typer.echo(f"Next, if the loss is too high: tokensieve warmup --config warmup-shared --model {out}")
