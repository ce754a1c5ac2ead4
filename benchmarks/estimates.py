"""Said and taken: python benchmarks/estimates.py [--device cuda] [--busy 2]

Ten short training runs of the bundled model. Each says how long it will take, and this compares that with what it took.
`--busy N` starts N processes that do nothing but compute, beside all runs.
"""

import argparse
import logging
import subprocess
import sys
import tempfile
import time

import tokensieve
from tokensieve import cost, train
from tokensieve.config import DataConfig, PhaseConfig, SourceConfig, TrainConfig

# stage, whether selection is on, tokens of a row, rows of a step, steps
RUNS = (
    ("warmup", True, 512, 2, 30),
    ("warmup", True, 1024, 1, 30),
    ("warmup", True, 2048, 1, 12),
    ("warmup", True, 4096, 1, 5),
    ("adapt", True, 1024, 2, 8),
    ("adapt", True, 2048, 2, 4),
    ("adapt", True, 4096, 1, 3),
    ("adapt", False, 1024, 4, 6),
    ("adapt", False, 2048, 2, 5),
    ("adapt", False, 4096, 1, 4),
)
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # it ends with us, even if we are killed
LONGER_ON_GPU = 10  # times as many steps


class Said(logging.Handler):
    """What the run said, and when."""

    def emit(self, record: logging.LogRecord) -> None:
        for value in record.args if isinstance(record.args, tuple) else ():
            if isinstance(value, cost.Estimate):
                self.estimate, self.then = value, time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--busy", type=int, default=0)
    options = parser.parse_args()
    said = Said()
    logging.getLogger("tokensieve").addHandler(said)
    logging.getLogger("tokensieve").setLevel(logging.INFO)
    beside = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(options.busy)]
    held = 0
    try:
        for stage, selection, context, rows, steps in RUNS:
            times = LONGER_ON_GPU if options.device == "cuda" else 1
            with tempfile.TemporaryDirectory() as folder:
                data = DataConfig((SourceConfig("python"),), limit_bytes=3_000_000)
                phases = (PhaseConfig(steps * times, context, rows),)
                config = TrainConfig(
                    stage, "base", f"{folder}/out", phases, data, selection=selection, device=options.device, track=()
                )
                model = (
                    tokensieve.sparsify(tokensieve.load("base"), 128, 8, 32) if selection else tokensieve.load("base")
                )
                train.run(config, model, progress=False)
            took = time.perf_counter() - said.then
            low, high = cost.SHORTER * said.estimate.seconds, cost.LONGER * said.estimate.seconds
            held += low <= took <= high
            kind = stage if selection else "dense"
            run = f"{kind:8} {steps * times:4} x {rows} x {context:5}"
            verdict = "" if low <= took <= high else " OUTSIDE"
            share = took / said.estimate.seconds
            print(f"{run}: said {low:6.1f} to {high:6.1f} s, took {took:6.1f} s, {share:.2f} of the middle{verdict}")
    finally:
        for process in beside:
            process.kill()
    print(f"{held} of {len(RUNS)} within what was said; {options.busy} busy processes beside it, on {options.device}")


if __name__ == "__main__":
    main()
