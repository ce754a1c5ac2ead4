"""The experiments of post-training, as processes side by side on one GPU.

    python benchmarks/posttraining.py --at-once 8 --minutes 9 --out runs/posttraining
    python benchmarks/posttraining.py --quick --device cpu --at-once 1

- seed-N-sparse, seed-N-dense: the whole pipeline and its dense twin, on the same problems.
- sequential-1-DOMAIN and so on: from the distilled model of the first seed, GRPO on one domain after the other, with
  the problems and the budget of the mixed stage. The last one is measured on all domains: what was forgotten.
- without-TERM, TERM-xN: the mixed stage again, from the same model, with the weight of one term of the reward 0, or N
  times what it is.

Each is a command of `tokensieve` in a folder of its own under --work, with a log beside it. After --minutes, or Ctrl-C,
or if this process is killed, what runs is stopped. The same command goes on with what is not done. Whatever is there
goes to --out: tables.md, figures.json, trade-offs.svg, and each run's figures, curves and log. The models stay under
--work.

If programs cannot be isolated, the domains that run them are left out, and the tables say so.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import posttraining_plot
import posttraining_tables

from tokensieve import sandbox
from tokensieve.config import UserError, load_config
from tokensieve.files import write_json, write_text
from tokensieve.machine import usable_cores
from tokensieve.posttrain_config import PosttrainConfig
from tokensieve.tasks.problems import DOMAINS
from tokensieve.tethered import tethered

RUN_PROGRAMS = ("programming", "coding")
# By which the weight of a term is multiplied. The highest makes length and language count more than the outcome.
FACTORS = {"length": (0, 1, 4, 16), "language": (0, 1, 4, 16), "rubric": (0, 1), "outcome": (0, 1)}
KEPT = ("metrics.json", "history.json", "*.html", "*.svg")  # of a run: all but weights and samples

QUICK = (
    'domains=["logic","writing"]', 'modes=["direct"]', "tokens=600", "new_tokens=8", "evaluation=2", "at_once=4",
    "save_every=0", "cold.steps=1", "cold.rows=2", "cold.micro_batch=2", "specialist.steps=1", "specialist.prompts=1",
    "specialist.samples=2", "specialist.micro_batch=2", "distill.prompts=1", "distill.samples=1", "distill.keep=1",
    'distill.fill="demonstrations"', "distill.train.steps=1", "distill.train.rows=2", "distill.train.micro_batch=2",
    "rl.train.steps=2", "rl.train.prompts=2", "rl.train.samples=2", "rl.train.micro_batch=2",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A command of tokensieve that leaves one folder, once those that it needs are done."""

    name: str
    command: tuple[str, ...]
    sets: tuple[str, ...]
    needs: tuple[str, ...] = ()

    def arguments(self, work: Path) -> list[str]:
        sets = [word for value in self.sets for word in ("--set", value)]
        resume = ["--resume"] if (work / self.name / "metrics.json").is_file() else []
        return [sys.executable, "-m", "tokensieve", *self.command, "--out", str(work / self.name), *sets, *resume]

    @property
    def label(self) -> str:
        """What is told of it. A job that needs itself makes the page of a run that is done, beside its twin."""
        return f"the page of {self.name} and its twin" if self.name in self.needs else self.name

    @property
    def settings(self) -> str:
        """All that its figures depend on, as the file of what is done keeps it."""
        return "\n".join([*self.command, *self.sets]) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="base", help="of tokensieve posttrain")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="KEY=VALUE", help="for every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--at-once", type=int, default=8, help="processes side by side")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which what runs is stopped")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="two domains, one seed, a step or two a stage")
    parser.add_argument("--out", type=Path, default=Path("runs/posttraining"))
    parser.add_argument("--work", type=Path, help="folder of the runs with their weights; default: OUT/work")
    asked = parser.parse_args()
    if asked.at_once < 1:
        parser.error("--at-once must be at least 1")
    if len({*asked.seeds}) < len(asked.seeds):
        parser.error(f"--seeds {' '.join(map(str, asked.seeds))}: each has a folder of its own; name each once")
    for key, option in (("device", "--device"), ("seed", "--seeds")):
        if key in {value.partition("=")[0].strip() for value in asked.sets}:
            parser.error(f"--set {key}: give {option}")
    asked.work = asked.work or asked.out / "work"
    if asked.quick:
        asked.seeds, asked.sets = asked.seeds[:1], [*QUICK, *asked.sets]
    asked.sets.append(f"device={asked.device}")
    return asked


def settings(asked: argparse.Namespace) -> tuple[PosttrainConfig, list[str]]:
    """The config of all runs, and lines on what differs from the one that was asked for."""
    name = f"posttrain-{asked.config}" if not asked.config.endswith(".toml") else asked.config
    config, notes = load_config(PosttrainConfig, name, tuple(asked.sets)), []
    domains = config.domains or tuple(DOMAINS)
    why_not = sandbox.why_not() if set(domains) & set(RUN_PROGRAMS) else None
    if why_not:
        domains = tuple(name for name in domains if name not in RUN_PROGRAMS)
        if not domains:
            raise UserError(f"{' and '.join(config.domains)}: no domain is left, since {why_not}; name others")
        notes.append(f"{' and '.join(RUN_PROGRAMS)} are left out: {why_not}")
    asked.sets.append(f"domains={json.dumps(domains)}")
    steps, each = config.rl.train.steps, max(1, config.rl.train.steps // len(domains))
    if steps != each * len(domains):
        notes.append(f"the mixed stage has {each * len(domains)} steps in place of {steps}: {each} for each domain")
        asked.sets.append(f"rl.train.steps={each * len(domains)}")
    return load_config(PosttrainConfig, name, tuple(asked.sets)), notes


def runs_by_weight(config: PosttrainConfig, first: str) -> posttraining_tables.ByWeight:
    """The runs of the mixed stage by term of the reward and its weight: `first`, with the config's, and others.

    A term that the config gives the weight 0 is not there.
    """

    def name(term: str, factor: int) -> str:
        return {0: f"without-{term}", 1: first}.get(factor, f"{term}-x{factor}")

    given = {term: getattr(config.reward, term) for term in FACTORS}
    return {
        term: {factor * given[term]: name(term, factor) for factor in factors}
        for term, factors in FACTORS.items()
        if given[term]
    }


def jobs(asked: argparse.Namespace, config: PosttrainConfig) -> list[Job]:
    """In the order in which they begin, as far as what they need is done."""
    begin = ("--config", asked.config)
    found = [
        Job(f"seed-{seed}-{arm}", ("posttrain", *begin, *more), (*asked.sets, f"seed={seed}"))
        for seed in asked.seeds
        for arm, more in (("sparse", ()), ("dense", ("--dense",)))
    ]
    first = found[0]
    distilled = asked.work / first.name / "distilled/train/model"
    stage = ("rl", *begin)
    each, needs, model = config.rl.train.steps // len(config.domains), (first.name,), distilled
    chain = []
    for place, domain in enumerate(config.domains, 1):
        sets = (*first.sets, f"model={model}", f"rl.model={model}", f"rl.train.steps={each}")
        if place < len(config.domains):
            sets = (*sets, f"domains={json.dumps([domain])}")
        else:  # measured on all of them
            sets = (*sets, *(f"rl.ratios.{other}=0" for other in config.domains if other != domain))
        chain.append(Job(f"sequential-{place}-{domain}", stage, sets, needs))
        needs, model = (chain[-1].name,), asked.work / chain[-1].name / "final/model"
    starts = (f"model={distilled}", f"rl.model={distilled}")
    weighed = [
        Job(name, stage, (*first.sets, *starts, f"reward.{term}={weight:g}"), (first.name,))
        for term, by_weight in runs_by_weight(config, first.name).items()
        for weight, name in by_weight.items()
        if name != first.name
    ]
    pages = [  # again, for a report that shows both arms
        Job(one.name, one.command, (*one.sets, f"beside={asked.work / other.name}"), (one.name, other.name))
        for one, other in zip(found[::2], found[1::2], strict=True)
    ]
    return [*found, *chain, *weighed, *pages]


class Runs:
    """Processes side by side. What is done has a file NAME.done, or NAME.page.done for a report, in the work folder.

    The file holds the job's settings. UserError if a job is done with other ones.
    """

    def __init__(self, work: Path, waiting: list[Job], at_once: int):
        self.work, self.waiting, self.at_once = work, waiting, at_once
        self.running: dict[Job, tuple[subprocess.Popen, float]] = {}
        self.failed: list[str] = []
        self.tethers = ExitStack()
        threads = str(max(1, (usable_cores() or 1) // at_once))
        self.environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
        work.mkdir(parents=True, exist_ok=True)
        for job in waiting:
            done = self._done(job)
            if done.exists() and done.read_text(encoding="utf-8") != job.settings:
                raise UserError(f"{done}: {job.name} was run with other settings; give another --out, or remove {work}")

    def _done(self, job: Job) -> Path:
        return self.work / f"{job.name}{'.page' if job.name in job.needs else ''}.done"

    def run(self, seconds: float) -> list[str]:
        """Labels of what is not done: it failed, waits for what did, or was stopped after so many seconds."""
        begin = time.monotonic()
        with self.tethers:
            stopped = self._until(begin + seconds)
        return [*self.failed, *stopped, *(job.label for job in self.waiting if not self._done(job).exists())]

    def _until(self, end: float) -> list[str]:
        """Labels of what still ran at that time of the monotonic clock, or at Ctrl-C, and has been told to end."""
        try:
            while self.waiting or self.running:
                self._start()
                if not self.running or time.monotonic() > end:
                    break
                time.sleep(0.2)
                self._reap()
        except KeyboardInterrupt:
            print("stopped", flush=True)
        for process, _ in self.running.values():
            process.terminate()  # all of them, before the first one is waited for
        return [job.label for job in self.running]

    def _start(self) -> None:
        for job in list(self.waiting):
            done = self._done(job).exists()
            ready = all((self.work / f"{name}.done").exists() for name in job.needs)
            if done or (ready and len(self.running) < self.at_once):
                self.waiting.remove(job)
            if not done and job not in self.waiting:
                with open(self.work / f"{job.name}.log", "a", encoding="utf-8") as log:
                    streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "env": self.environment}
                    process = self.tethers.enter_context(tethered(job.arguments(self.work), **streams))
                self.running[job] = process, time.monotonic()
                print(f"{job.label}: begun", flush=True)

    def _reap(self) -> None:
        for job, (process, begun) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[job]
            print(f"{job.label}: status {process.returncode} after {time.monotonic() - begun:.0f} s", flush=True)
            if process.returncode == 0:
                write_text(self._done(job), job.settings)
            else:
                self.failed.append(job.label)


def collect(work: Path, out: Path) -> None:
    """Copies all of the runs but weights and samples."""
    for path in [*work.glob("*.log"), *(path for kept in KEPT for path in work.glob(f"*/**/{kept}"))]:
        if any(part.startswith(("model", "checkpoint-", "adapter")) for part in path.relative_to(work).parts[:-1]):
            continue
        target = out / "runs" / path.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def main() -> None:
    asked = arguments()
    config, notes = settings(asked)
    waiting = jobs(asked, config)
    names = [job.name for job in waiting]
    left = Runs(asked.work, waiting, asked.at_once).run(60 * asked.minutes)
    if left:
        notes.append(f"not done: {', '.join(dict.fromkeys(left))}; the same command goes on with them")
    collect(asked.work, asked.out)
    runs = posttraining_tables.read(asked.out / "runs")
    asked_for = {name: run for name, run in runs.items() if name in names}  # those of other seeds may lie there too
    by_weight = runs_by_weight(config, names[0])
    text, figures = posttraining_tables.tables(asked_for, names[0], by_weight, notes)
    write_text(asked.out / "tables.md", text)
    write_json(asked.out / "figures.json", figures)
    posttraining_plot.write_trade_offs(asked.out, figures[posttraining_tables.WEIGHTS])
    print(text)
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"posttraining: {error}")
