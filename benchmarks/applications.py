"""The six applications of examples/, one after the other, as one table: dense beside sparse attention of one model.

    python benchmarks/applications.py --model sparse --context 1024 4096 16384 --device cuda
    python benchmarks/applications.py --quick

The figures of each application and context are written to a file in --out as soon as they are there. The same command
goes on after the last one. An application that fails is named on stderr, and the others run.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "arms")

sys.path.insert(0, str(EXAMPLES))
from arms import interval, quality  # noqa: E402 - examples/ is not a package

from tokensieve.report.origin import environment  # noqa: E402

HEAD = ("application", "prompt", "n", "dense", "sparse", "sparse - dense", "s, dense / sparse", "MiB, dense / sparse")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sparse", help="a bundled name, smollm2, a folder")
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 4096, 16384], help="tokens of a text")
    parser.add_argument("--cases", type=int, default=16, help="of each part")
    parser.add_argument("--top-k", type=int, default=0, help="keys per query; 0: the model's own")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="these applications alone")
    parser.add_argument("--quick", action="store_true", help="two cases in 128 tokens, with k = 64")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "applications")
    asked = parser.parse_args()
    if asked.quick:
        asked.context, asked.cases, asked.top_k = [128], 2, 64
    return asked


def figures(name: str, context: int, asked: argparse.Namespace) -> dict[str, Any]:
    """The figures that an application wrote, which runs unless it wrote them before.

    Raises:
        ValueError: those in --out are of other options or another machine, or it failed, which it said on stderr.
    """
    path = asked.out / f"{name}-{context}.json"
    options = {
        "model": asked.model,
        "tokens": context,
        "cases": asked.cases,
        "top_k": asked.top_k,
        "device": asked.device,
    }
    if not path.exists():
        given = [f"--{option.replace('_', '-')}={value}" for option, value in options.items()]
        command = [sys.executable, str(EXAMPLES / f"{name}.py"), *given, f"--out={path}"]
        begin = time.perf_counter()
        status = subprocess.run(command, stdout=sys.stderr).returncode
        if status:
            raise ValueError(f"{name} at {context} tokens ended with {status}")
        print(f"{name} at {context} tokens: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    found = json.loads(path.read_text(encoding="utf-8"))
    if any(found["asked"][option] != value for option, value in options.items()):
        raise ValueError(f"{path} was made with other options ({found['asked']}); give another --out")
    made, here = found["environment"]["machine"], environment()["machine"]
    if made != here:
        raise ValueError(f"{path} was made on another machine ({made}; this one: {here}); give another --out")
    return found


def row(part: dict[str, Any]) -> list[str]:
    """Cells of a part under `HEAD`, and its verdict. Memory is the peak on a GPU, else what the cache holds."""
    dense, sparse = part["arms"]["dense"], part["arms"]["sparse"]
    n, clusters = dense["quality"]["n"], dense["quality"]["clusters"]
    memory = "peak_bytes" if dense["peak_bytes"] else "held_bytes"
    return [
        part["part"],
        f"{part['prompt_tokens']:,}",
        f"{n}" if clusters == n else f"{n} about {clusters}",
        quality(dense["quality"], part["unit"]),
        quality(sparse["quality"], part["unit"]),
        interval(part["difference"], "+.3f") if part["difference"] else "",
        f"{dense['seconds']:.3f} / {sparse['seconds']:.3f}",
        f"{dense[memory] / 2**20:.1f} / {sparse[memory] / 2**20:.1f}",
        f"not measurable {part['reason']}" if part["take"] is None else f"{part['take']}: {part['reason']}",
    ]


def main() -> int:
    asked, rows, found, failed = arguments(), [], {}, 0
    for context in asked.context:
        for name in asked.only:
            try:
                found = figures(name, context, asked)
            except ValueError as error:
                print(f"applications: {error}", file=sys.stderr)
                failed += 1
            else:
                rows += [row(part) for part in found["parts"]]
    if rows:
        where = found["environment"]
        print(f"{asked.model}: {where['machine']} · {where['versions']} · {where['date']}\n")
        for cells in ([*HEAD, "verdict"], ["---"] * (len(HEAD) + 1), *rows):
            print(f"| {' | '.join(cells)} |")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
