"""What is noted about one request on its way, and the log's lines."""

import json
import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import HTTPConnection

log = logging.getLogger("tokensieve.serve")


@dataclass
class Record:
    """One request's counts, filled in on its way. It never holds any text of prompts or answers."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    model: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish: str | None = None


def record_of(request: HTTPConnection) -> Record:
    """The record that the gate attached to a request."""
    return request.scope["state"]["record"]


def log_event(event: str, **fields: Any) -> None:
    """Log one line of JSON. time: seconds since 1970."""
    log.info(json.dumps({"event": event, "time": round(time.time(), 3), **fields}))
