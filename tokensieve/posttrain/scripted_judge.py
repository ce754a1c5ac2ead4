"""A judge by rules behind an OpenAI-compatible endpoint, for where no language model is at hand.

It scores the criteria that `tokensieve.tasks.problems.checks` knows, and refuses every other one. Its model is called
"scripted", and so is the judge in every result.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tokensieve.config import UserError
from tokensieve.tasks.problems.checks import met

NAME = "scripted"
LONGEST = 16 * 2**20  # bytes of a request


def judged(body: dict[str, Any]) -> dict[str, Any]:
    """The completion of a request that `Judge` sends: one score for each criterion, 1 or 0.

    UserError for a request of another form, and for a criterion that no rule checks.
    """
    try:
        asked = json.loads(body["messages"][-1]["content"])
        answer, criteria = str(asked["answer"]), [str(criterion) for criterion in asked["criteria"]]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError("the scripted judge reads what tokensieve's judge sends, and nothing else") from error
    content = json.dumps({"scores": [float(met(criterion, answer)) for criterion in criteria]})
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": NAME, "object": "chat.completion", "created": 0, "model": NAME, "choices": [choice]}


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length") or 0)
            if length > LONGEST:
                raise UserError(f"a request has {length} bytes; the scripted judge reads up to {LONGEST}")
            status, answer = 200, judged(json.loads(self.rfile.read(length)))
        except (UserError, ValueError) as error:
            status, answer = 400, {"error": {"message": str(error), "type": "invalid_request_error"}}
        raw = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: standard error is for messages."""


@contextmanager
def scripted_judge() -> Iterator[str]:
    """The endpoint's url, on a free port of loopback, for as long as the block lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
