"""`tokensieve eval --suite`: the suites of a model on this machine, and the line that shows how far they are."""

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from tokensieve.cli.program import stderr

if TYPE_CHECKING:
    from tokensieve.evals import Finished
    from tokensieve.evaluate_config import EvaluateConfig
    from tokensieve.model import DecoderForCausalLM
    from tokensieve.tasks import Document

log = logging.getLogger("tokensieve")

MEASURED = "measured.json"  # what a suite has measured so far, beside metrics.json
TOLD = 60  # seconds between two lines of a log that no terminal shows


def measure_suite(
    suite: str,
    model: "DecoderForCausalLM",
    before: "DecoderForCausalLM | None",
    tokenizer: Any,
    documents: "list[Document]",
    sizes: "EvaluateConfig",
    context: int | None,
    selections: dict[str, str],
    finished: "Finished",
) -> dict[str, Any]:
    """The figures of "long", "short" or "parity". before: the model before its adaptation."""
    from tokensieve import evals

    with Progress() as on_progress:
        if suite == "short":
            arms = evals.short_arms(model, before)
            return evals.judge_short(arms, tokenizer, documents, sizes.short, on_progress)
        if suite == "parity":
            return evals.judge_parity(
                model, tokenizer, documents, sizes.parity, sizes.long, context, before, on_progress, finished
            )
        long = sizes.long if context is None else replace(sizes.long, contexts=(context,))
        arms = evals.long_arms(model, long.top_k, selections)
        judged = [name for name, arm in arms.items() if arm.selection in ("dense", "indexer")]
        return evals.judge_long(arms, tokenizer, documents, long, on_progress, judged, finished=finished)


class Progress:
    """A line that shows what is being measured and about how long the rest takes; without a terminal, a log line a
    minute. It is the callback of an evaluation (`evals.OnProgress`).
    """

    def __init__(self) -> None:
        self._status = stderr().status("Measuring")
        self._total = 0
        self._first = self._told = (0.0, 0)  # when, and what was done then

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Shows the line. The rest is as fast as what was done since the first call of the same total."""
        from rich.markup import escape

        from tokensieve.cost import duration

        now = time.monotonic()
        if total != self._total or done < self._first[1]:
            self._total, self._first, self._told = total, (now, done), (now, done)
        since, begun = self._first
        left = f", about {duration((now - since) * (total - done) / (done - begun))} left" if done > begun else ""
        line = f"Measuring: {what}, {done} of {total}{left}"
        self._status.update(escape(line))
        if not stderr().is_terminal and now - self._told[0] > TOLD:
            self._told = (now, done)
            log.info("%s", line)
