"""The frame of hostile programs: each tries what it must not, and prints BROKEN if it can, else held.

@NAME@ in a source is replaced by something of the host, which `tests.support.sandbox_worker` has planted.
"""

from dataclasses import dataclass

MEBI = 1 << 20
SECONDS, SHORT = 30.0, 1.0  # for a program that ends by itself, and for one that never would
OUTPUT_BYTES, DISK_BYTES, MEMORY_BYTES, PROCESSES = 1 << 16, 8 * MEBI, 192 * MEBI, 16

PRELUDE = """
import ctypes, errno, os, signal, socket, stat, sys, time
libc = ctypes.CDLL(None, use_errno=True)

def attempt(what, action, *arguments, **options):
    try:
        got = action(*arguments, **options)
    except (OSError, ValueError, RuntimeError, MemoryError, AttributeError) as error:
        print("held", what, type(error).__name__, error, flush=True)
    else:
        print("BROKEN", what, repr(got)[:200], flush=True)

def call(what, name, *arguments):  # of libc, or a number
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    got = libc.syscall(ctypes.c_long(name), *wide) if isinstance(name, int) else getattr(libc, name)(*wide)
    print("BROKEN" if got != -1 else "held", what, got, os.strerror(ctypes.get_errno()), flush=True)

def read(path):
    return open(path, "rb").read(200)

def write(path):
    open(path, "wb").write(b"@SECRET@")
"""


@dataclass(frozen=True)
class Hostile:
    name: str
    source: str
    ended: str = "exit"
    seconds: float = SECONDS
    cpu_seconds: float = SECONDS
    memory_bytes: int = MEMORY_BYTES


def endless(name: str, source: str, ended: str = "time", **limits: float) -> Hostile:
    """A program that is killed, by default after a short time."""
    return Hostile(name, source, ended, **({"seconds": SHORT} | limits))
