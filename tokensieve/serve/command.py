"""What `tokensieve serve` does, and what it needs to do it."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokensieve.config import UserError

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: str,
    host: str,
    port: int,
    device: str,
    engine: dict[str, Any],
    settings: dict[str, Any],
    announce: Callable[[str], Any],
) -> None:
    """engine, settings: fields of EngineConfig and of ServeConfig. announce: gets one line once the server answers."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {', '.join(missing)}; pip install 'tokensieve[serve]'")
    from tokensieve.engine import EngineConfig
    from tokensieve.machine import choose_device
    from tokensieve.model import check_tokenizer, load, load_tokenizer
    from tokensieve.serve import server
    from tokensieve.serve.settings import ServeConfig

    path = Path(model)
    config = ServeConfig(path.resolve().name if path.is_dir() else model, **settings)
    engine_config = EngineConfig(**engine)
    with server.listen(host, port) as listening:  # before the model is read: a port in use is known at once
        loaded = load(model, device=choose_device(device))
        if not loaded.is_sparse:
            if config.mirror:
                raise UserError(f"--mirror: {model} is dense, and there is nothing to compare it with")
            config = replace(config, dense=False)
        tokenizer = load_tokenizer(model)
        check_tokenizer(tokenizer, loaded.config)
        served = " and ".join(config.models)
        server.run(loaded, tokenizer, listening, config, engine_config, lambda at: announce(f"{at}/v1 serves {served}"))
