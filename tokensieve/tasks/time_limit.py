"""A time limit on code that comes with a model, such as its chat template: an endless loop ends in an exception.

It works in every thread, as signals do not, since the server renders templates beside its event loop. A single
operation of C, such as 10 ** 10 ** 10, is not interrupted.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TimeIsUp(BaseException):
    """The limit is reached. No Exception, since code that must stop may handle those."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within the block `TimeIsUp` is raised after so many seconds; after the block never."""
    raise_in, thread = ctypes.pythonapi.PyThreadState_SetAsyncExc, ctypes.c_ulong(threading.get_ident())
    lock, ended = threading.Lock(), False

    def stop() -> None:
        with lock:
            if not ended:
                raise_in(thread, ctypes.py_object(TimeIsUp))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            ended = True
        timer.cancel()
        raise_in(thread, None)  # takes back what has not been raised yet
