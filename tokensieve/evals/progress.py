"""The one callback for the progress of an evaluation."""

from collections.abc import Callable

# Called with what is being measured, and how many units of the whole call are done, of how many.
OnProgress = Callable[[str, int, int], None]


def part(on_progress: OnProgress | None, what: str, before: int, total: int) -> OnProgress | None:
    """The callback for a part of a call, which counts from 0: what it has done is added to `before`, of `total`."""
    if on_progress is None:
        return None
    return lambda _, done, __: on_progress(what, before + done, total)
