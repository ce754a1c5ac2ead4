"""The start of a sandbox: wall and processor time of a Python program that does nothing, in a sandbox and without one.

Prints milliseconds, the least and the median of 40 calls that alternate: python benchmarks/sandbox.py
"""

import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable

from tokensieve import sandbox

CALLS = 40
NOTHING = [sandbox.interpreter(), "-I", "-S", "-c", "pass"]


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall time, and of processor time of the processes that the call started."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    call()
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    sandbox.run(NOTHING)
    bare, boxed = [], []
    for _ in range(CALLS):
        bare.append(timed(lambda: subprocess.run(NOTHING, env={})))
        boxed.append(timed(lambda: sandbox.run(NOTHING)))
    print(f"isolation: {sandbox.isolation()}, load {os.getloadavg()[0]:.1f}")
    for name, found in (("bare interpreter", bare), ("in a sandbox", boxed)):
        walls, processors = zip(*found)
        least, median, used = min(walls), statistics.median(walls), statistics.mean(processors)
        print(f"{name}: wall {least * 1e3:.0f} (least), {median * 1e3:.0f} (median); processor {used * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
