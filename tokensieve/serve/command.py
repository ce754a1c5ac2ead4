"""`tokensieve serve`: load a model, start an engine on it, and serve it until a signal."""

import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokensieve.config import UserError

if TYPE_CHECKING:
    from tokensieve.model import DecoderForCausalLM

REQUIRED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: str,
    host: str,
    port: int,
    device: str,
    options: dict[str, Any],
    settings: dict[str, Any],
    check: "Callable[[DecoderForCausalLM], None]",
    announce: Callable[[str], Any],
) -> None:
    """Serve `model` at host and port until a signal.

    options, settings: fields of EngineConfig and of ServeConfig. check: called with the model once it is read, to raise
    UserError if it cannot be served so. announce: called with one line once the server answers.
    Raises UserError for a missing package, a port in use, settings that do not go together, and a selector of one's own
    that breaks its contract. One that runs on several ranks is not tried.
    """
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {', '.join(missing)}; pip install 'tokensieve[serve]'")
    from tokensieve.engine import EngineConfig, engine_on
    from tokensieve.engine.tensor_parallel import load_rank
    from tokensieve.evals.trial import try_selection
    from tokensieve.mesh import join_mesh
    from tokensieve.model import check_tokenizer, load_tokenizer
    from tokensieve.serve import server
    from tokensieve.serve.settings import ServeConfig

    path = Path(model)
    name = path.resolve().name if path.is_dir() else model
    config = ServeConfig(name, **settings | {"allow_hosts": (host, *settings.get("allow_hosts", ()))})
    engine_config = EngineConfig(**options)
    with ExitStack() as stack:
        ranks = stack.enter_context(join_mesh(device))
        # before the model is read, so that a port in use is reported at once
        listening = stack.enter_context(server.listen(host, port)) if ranks.leads else None
        loaded = load_rank(model, ranks)
        check(loaded)
        if not loaded.is_sparse:
            if config.mirror:
                raise UserError(f"--mirror: {model} is dense, and there is nothing to compare it with")
            config = replace(config, dense=False)
        if ranks.size == 1:
            try_selection(loaded, config.selection, engine_config.top_k or None)
        tokenizer = load_tokenizer(model)
        check_tokenizer(tokenizer, loaded.config)
        served = " and ".join(config.models)
        engine = stack.enter_context(engine_on(ranks, loaded, tokenizer, engine_config))
        if engine is not None and listening is not None:
            server.run(engine, listening, config, lambda at: announce(f"{at}/v1 serves {served}"))
