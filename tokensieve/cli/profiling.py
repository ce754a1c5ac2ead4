"""The command that says whether sparse attention is worth it, before anything is trained."""

import time
from pathlib import Path
from typing import Annotated

import typer

from tokensieve.cli.program import Config, Device, Set, app, stderr, stdout, tokenizer_of, with_keys


@app.command(cls=with_keys("ProfileConfig", "profile", "tokensieve.profile_config"))
def profile(
    data: Annotated[str, typer.Argument(help="Your text: a folder, a file, a glob, hf:NAME or python; SOURCE#FIELD.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder in Hugging Face format, or a bundled name.")] = "base",
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens at which texts are cut; the model's positions unless given.")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0, help="For the measurement of attention; it takes what fits.")] = 15,
    peak_flops: Annotated[
        float | None,
        typer.Option(min=1, help="FLOPs per second of the device that would train; else this machine is timed."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of figures and page; runs/profile-NAME unless given.")
    ] = None,
    config: Config = "profile",
    set_: Set = None,
    device: Device = "auto",
) -> None:
    """Say whether sparse attention is worth it for a model and your data, with how many keys, and what it would cost.

    It counts the lengths of the data's documents, and measures what share of the model's attention the best k keys
    hold, layer by layer, and how alike the best keys of close layers are. Nothing is trained.

    Example: tokensieve profile corpus/ --model base --minutes 5
    """
    from tokensieve.config import GENERATED, UserError, load_config
    from tokensieve.files import check_source, known_folder
    from tokensieve.profile_config import ProfileConfig

    begin = time.perf_counter()
    settings = load_config(ProfileConfig, config, tuple(set_ or ()))
    known_folder(model)
    if data in GENERATED:
        raise UserError(f"data source {data!r} is made from the text of others; name that text")
    check_source(data)
    import tokensieve
    from tokensieve.machine import choose_device
    from tokensieve.profile import profile, read_sample
    from tokensieve.report import environment, show_profile, write_profile
    from tokensieve.tasks import encoder

    loaded = tokensieve.load(model, device=choose_device(device))
    encode = encoder(tokenizer_of(model, loaded))
    with stderr().status("Reading the data") as status:
        sample = read_sample(data, encode, settings.limit_bytes)
        status.update("Measuring attention: a short pass")

        def on_progress(what: str, done: int, total: int) -> None:
            status.update(f"Measuring attention: {what} {done} of at most {total}")

        figures = profile(loaded, encode, sample, settings, 60 * minutes, context, peak_flops, on_progress)
    metrics = {"model": model, "data": data, **figures, "seconds": time.perf_counter() - begin, "run": environment()}
    folder = out or Path("runs") / f"profile-{Path(model).name}"
    page = write_profile(folder, metrics, settings.mass, settings.sharing)
    show_profile(stdout(), metrics)
    typer.echo(f"\nFigures and page: {page}")
