"""The process that compares expressions: a line of JSON in, a verdict out. It ends with its input.

A script of its own, so that it starts without the rest of the package. Its parent holds the time limit; the one here is
for a parent that was killed.
"""

import json
import signal
import sys

READY = "ready\n"
LONGEST = 60  # seconds of a comparison, many times what a parent waits for
MEMORY_BYTES = 2 * 2**30  # of addresses


def main() -> None:
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from math_verify import parse, verify

    print(READY, end="", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        signal.alarm(LONGEST)  # which ends the process: there is no handler
        # math-verify's own limits are signals of the main thread; none is needed here.
        right, answer = (parse(asked[name], parsing_timeout=None) for name in ("right", "answer"))
        print(json.dumps(bool(right) and bool(answer) and verify(right, answer, timeout_seconds=None)), flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    main()
