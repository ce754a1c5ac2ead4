"""tokensieve's models in lm-evaluation-harness, under the name `tokensieve`, log-likelihood tasks included.

    python -m tokensieve.lm_eval run --model tokensieve --model_args path=sparse --tasks TASKS

lm-evaluation-harness 0.4.13 finds no models of other packages: its registry is filled by imports alone. So this program
registers ours there and then is `lm_eval`, with all of its options. If lm_eval is not installed beside tokensieve, the
program runs in an environment of its own, made on first use.

The model is served by `tokensieve serve` on this machine, and asked through lm_eval's own client of completions: with
`echo` and `logprobs` these score prompts.
"""

import atexit
import importlib.util
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

NAME = "tokensieve"
ROOT = Path(__file__).resolve().parents[1]
# Our place comes last, since all that is installed beside us may lie there, in other versions than the harness has.
AGAIN = (
    "import sys; sys.path.append(sys.argv.pop(1)); from tokensieve import lm_eval; lm_eval.evaluate(sys.argv.pop(1))"
)


def model_class(python: str) -> type:
    """lm_eval's client of completions, as a model that takes `path` and serves it.

    python: the interpreter that has tokensieve. The model's arguments: path, a folder or a name; selection, "indexer"
    or "dense"; server_device, since lm_eval's `device` is never unset; and those of `local-completions`.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from tokensieve.config import UserError
    from tokensieve.files import known_folder
    from tokensieve.server_process import NotServed, server_process

    class Served(LocalCompletionsAPI):
        def __init__(self, path: str, selection: str = "indexer", server_device: str = "auto", **options: Any):
            if selection not in ("indexer", "dense"):
                raise UserError(f"selection={selection}: indexer or dense")
            folder = known_folder(path)
            served = ExitStack()
            atexit.register(served.close)
            try:
                url = served.enter_context(server_process(path, server_device, python))
            except NotServed as error:
                raise UserError(f"{path} cannot be served: {error}") from error
            model = _names(url)[0 if selection == "indexer" else -1]
            given = {"tokenizer": str(folder or path), "max_length": _room(url), **options}
            fixed = {"model": model, "base_url": f"{url}/completions", "tokenizer_backend": "huggingface"}
            super().__init__(**given | fixed)

        def tok_encode(self, string: Any, left_truncate_len: int | None = None, **how: Any) -> Any:
            """Token ids; those of prompts to continue, which come as a list, begin with the first token."""
            ids = super().tok_encode(string, left_truncate_len, **how)
            return ids if isinstance(string, str) else [self._begun(one)[-(left_truncate_len or 0) :] for one in ids]

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            before, after = super()._encode_pair(context, continuation)
            return self._begun(before), after

        def _begun(self, ids: list[int]) -> list[int]:
            """With the first token of a text, which models are trained with, and lm_eval leaves out by default."""
            first = self.tokenizer.bos_token_id
            return ids if first is None or ids[:1] == [first] else [first, *ids]

    return Served


def _cards(url: str) -> list[dict[str, Any]]:
    import json
    from urllib.request import urlopen

    with urlopen(f"{url}/models") as reply:
        return json.load(reply)["data"]


def _names(url: str) -> list[str]:
    """The served models' ids: the model, and its dense twin if there is one."""
    return [card["id"] for card in _cards(url)]


def _room(url: str) -> int:
    """Tokens of the longest context."""
    return _cards(url)[0]["max_model_len"]


def evaluate(python: str) -> None:
    """lm_eval's command line with our model in its registry. python: the interpreter that has tokensieve."""
    from lm_eval import models as _  # noqa: F401  an empty registry is not filled once ours is in it
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    from tokensieve.config import UserError

    model_registry.register(NAME)(model_class(python))
    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(f"tokensieve: error: {error}")


def main() -> None:
    """The program: here if lm_eval is installed here, else in the environment of the harness."""
    if importlib.util.find_spec("lm_eval") is not None:
        evaluate(sys.executable)
        return
    from tokensieve.evals.paper.harnesses import HARNESSES, environment, program

    python = program(environment(HARNESSES["lm-eval"], lambda line: print(line, file=sys.stderr)))
    os.execv(python, [python, "-E", "-c", AGAIN, str(ROOT), sys.executable, *sys.argv[1:]])  # -E: no PYTHONPATH either


if __name__ == "__main__":
    main()
