"""Post-training as a script: specialists, distillation, one mixed stage of reinforcement learning, and figures of all.

Each part makes one model, from one that another part left in the run's folder. metrics.json says which are done, so the
same command continues where it was stopped: by Ctrl-C, by a kill, or because it was to do one part only.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console

from tokensieve import cost, train
from tokensieve.config import UserError, to_dict
from tokensieve.machine import choose_device
from tokensieve.posttrain import stages
from tokensieve.posttrain.pace import Pace, Work
from tokensieve.posttrain.parts import BASE, DISTILLED, FINAL, ON_POLICY, SAME, Parts, Watch, specialist_of
from tokensieve.posttrain_config import GrpoConfig, PosttrainConfig
from tokensieve.report import environment, show_posttraining, write_curves, write_posttraining
from tokensieve.report.posttrain import MIXED
from tokensieve.report.posttrain_page import ARMS
from tokensieve.run_record import Clock, RunRecord
from tokensieve.tasks.problems import DOMAINS, MODES, Domain, Rows, domain

EVALUATION = "evaluation"


@dataclass(frozen=True)
class Part:
    """A part and the model that it makes, which has its name. domains: on whose held-out problems it is measured.

    trains_on: whatever decides its result.
    """

    name: str
    folder: str
    domains: tuple[str, ...]
    work: Work
    micro_batch: int
    do: Callable[[Parts], None]
    trains_on: Any


def run(
    config: PosttrainConfig, resume: bool = False, only: str | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Makes every model in the folder `config.out`, or `only` one of them, and measures those that are new.

    only: "specialist-DOMAIN", "distilled" (and "on-policy", if the config has it) or "final". DOMAIN is a name of
    `tasks.problems.domain`.

    Returns what metrics.json holds: by part its figures; "evaluation": by model and group; "seconds" of each part;
    "settings": digests; "selection", "judge", "judge_agreement"; "run": the machine. UserError for bad configs, for a
    part that is there without `resume`, for one whose model to start from is missing, and for whatever `Parts.check`
    finds missing; train.Interrupted after Ctrl-C.
    """
    begin, console, out = time.perf_counter(), console or Console(), Path(config.out)
    config = replace(config, device=choose_device(config.device))
    domains, sources = _domains(config.domains or tuple(DOMAINS))
    more: dict[str, Domain] = {}
    if only not in (None, DISTILLED, FINAL):
        more, its = _domains((only.removeprefix(specialist_of("")),))
        if any(sources.get(name, source) != source for name, source in its.items()):
            raise UserError(f"{only}: another domain of this name is among domains; rename the file, or leave one out")
        only, sources = specialist_of(*more), sources | its
    plan = _plan(config, tuple(domains), sources)
    leaves: dict[str, tuple[str, ...]] = {part.name: (part.folder,) for part in plan} | {EVALUATION: ()}
    record = RunRecord.of(out, leaves, resume or only is not None, "post-training run")
    if only in record.figures["seconds"] and not resume:
        raise UserError(f"{out} holds {only} already; add --resume to continue it, or name another folder")
    record.match(_settings(config, plan))
    record.figures |= {"selection": config.selection, "judge": config.judge.model}
    twin = _twin(config)
    try:
        with console.status("Loading the model") as status:
            watch = _Watched(record, status.update)
            parts = Parts(config, domains | more, record.figures, watch)
            asked_for = (only, ON_POLICY) if only == DISTILLED else (only,)
            wanted = [part for part in plan if only is None or part.name in asked_for]
            todo = [part for part in wanted if not parts.is_done(part.name)]
            for part in wanted:
                if part not in todo:
                    parts.tidy(part.name)
            if only is not None:
                for part in todo:
                    parts.check_start(part.name, part.domains)
            if todo:
                names = [*dict.fromkeys(name for part in todo for name in part.domains)]
                parts.check(names, rewarded=any(part.name not in (DISTILLED, ON_POLICY) for part in todo))
            pace = Pace(parts.load(config.model), config) if todo else None
            for part in todo:
                assert pace is not None
                _announce(console, begin, part.name, str(pace.of(part.work, part.micro_batch)))
                fresh, started = part.name not in record.figures["seconds"], time.perf_counter()
                with record.timing(part.name) as watch.clock:
                    part.do(parts)
                if fresh:  # of one that goes on only a part is left
                    pace.learn(part.work, time.perf_counter() - started)
            measured = [*dict.fromkeys(name for part in wanted for name in part.domains)]
            asked = len(config.modes) * sum(
                config.evaluation_of(name) for names in (measured, *(part.domains for part in wanted)) for name in names
            )
            needed = "" if pace is None else f": {pace.of(Work(read=asked, answers=asked), 1)}"
            _announce(console, begin, EVALUATION, f"{asked:,} held-out problems{needed}")
            with record.timing(EVALUATION) as watch.clock:
                parts.evaluate(BASE, measured)
                for part in wanted:
                    parts.evaluate(part.name, part.domains)
    except KeyboardInterrupt as error:
        raise train.Interrupted(f"what was done is kept in {out}; continue with --resume") from error
    for part in wanted:
        record.figures.setdefault(part.name, {})["steps"] = len(parts.history(part.name))
    record.figures["run"] = environment()
    record.write()
    histories = _histories(out, plan)
    write_curves(out, histories)
    arms = {ARMS[figures["selection"]]: figures for figures in (record.figures, *twin)}
    folders = (out, *([Path(config.beside)] if twin else []))
    write_posttraining(out, arms, {arm: _histories(f, plan) for arm, f in zip(arms, folders, strict=True)})
    show_posttraining(console, record.figures)
    console.print(
        f"\nDone in {cost.duration(time.perf_counter() - begin)}. {_next(out, wanted[-1].name, [*more])}",
        highlight=False,
        markup=False,
    )
    return record.figures


class _Watched(Watch):
    """Progress on the console, and the part's time in the record."""

    clock: Clock | None = None  # before the first part

    def __init__(self, record: RunRecord, show: Callable[[str], None]):
        self.record, self.show = record, show

    def on_progress(self, what: str, done: int, total: int) -> None:
        self.show(f"{what}: {done} of {total}")
        if self.clock is not None:
            self.clock.tick()

    def note(self) -> None:
        if self.clock is None:
            self.record.write()
        else:
            self.clock.note()


def _twin(config: PosttrainConfig) -> list[dict[str, Any]]:
    """The figures of the twin, if the config names one. UserError if it is none, or selects as this run does."""
    if not config.beside:
        return []
    try:
        figures = json.loads((Path(config.beside) / "metrics.json").read_text(encoding="utf-8"))
        other = figures["selection"], figures["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"beside: {config.beside} is no folder of a post-training run that is done; name another one"
        ) from error
    if other[0] == config.selection:
        raise UserError(f"beside: {config.beside} selects by {other[0]}, as this run does; name the folder of its twin")
    return [figures]


def _histories(out: Path, plan: Sequence[Part]) -> dict[str, stages.History]:
    """The rows of the stages of reinforcement learning that are done in a folder, by domain."""
    folders = {MIXED if p.name == FINAL else p.domains[0]: p for p in plan if p.name not in (DISTILLED, ON_POLICY)}
    found = {stage: stages.history(out / p.folder / ("" if p.name == FINAL else "rl")) for stage, p in folders.items()}
    return {stage: rows for stage, rows in found.items() if rows is not None}


def _domains(asked: Sequence[str]) -> tuple[dict[str, Domain], dict[str, Any]]:
    """The domains by name, and where each comes from: its name, that of a module's object, or a digest of its rows.

    UserError for an unknown one, and for two of one name.
    """
    found: dict[str, Domain] = {}
    sources: dict[str, Any] = {}
    for name in asked:
        each = domain(name)
        if each.name in found:
            raise UserError(f"domains: two are called {each.name}; rename a file, or leave one out")
        found[each.name], sources[each.name] = each, [each.name, each.digest] if isinstance(each, Rows) else name
    return found, sources


def _plan(config: PosttrainConfig, domains: tuple[str, ...], sources: Mapping[str, Any]) -> list[Part]:
    """The parts in their order. sources: of the domains, and perhaps of one more that gets a specialist.

    UserError for settings of no domain, and for a difficulty that is fixed for no group.
    """
    known = (*sources, *DOMAINS)  # one config may be for several runs
    tables = {"cold_steps": (config.cold_steps, known), "evaluations": (config.evaluations, known)}
    for table, (named, allowed) in (tables | {"rl.ratios": (config.rl.ratios, domains)}).items():
        for name in named:
            if name not in allowed:
                there = ", ".join(dict.fromkeys(allowed))
                raise UserError(f"{table}.{name} is none of the domains {there}; leave it out")
    groups = [f"{name}-{mode}" for name in known for mode in MODES]
    for group in config.difficulty.fixed:
        if group not in groups:
            raise UserError(
                f"difficulty.fixed.{group} is no DOMAIN-MODE of the domains {', '.join(sources)}; leave it out"
            )
    plan = [_specialist(config, name, source) for name, source in sources.items()]
    mine = [part.trains_on for part in plan if part.domains[0] in domains]
    answers = config.distill.samples * config.distill.prompts * len(config.modes) * len(domains)
    distilled = Part(
        name=DISTILLED,
        folder="distilled",
        domains=domains,
        work=Work(
            trained=config.distill.train.steps * config.distill.train.rows,
            read=config.distill.prompts * len(config.modes) * len(domains),
            answers=answers,
        ),
        micro_batch=config.distill.train.micro_batch,
        do=lambda parts: parts.distill(domains),
        trains_on=[mine, to_dict(replace(config.distill, on_policy=None))],
    )
    on_policy = _on_policy(config, domains, mine, distilled)
    starts = {part.name: part.trains_on for part in (distilled, *on_policy)}
    start = config.rl.model or DISTILLED
    final = Part(
        name=FINAL,
        folder="final",
        domains=domains,
        work=_grpo_work(config.rl.train),
        micro_batch=config.rl.train.micro_batch,
        do=lambda parts: parts.rl(domains),
        trains_on=[starts.get(start, start), mine, to_dict(config.rl)],
    )
    return [*plan, distilled, *on_policy, final]


def _on_policy(config: PosttrainConfig, domains: tuple[str, ...], mine: list[Any], distilled: Part) -> list[Part]:
    stage = config.distill.on_policy
    if stage is None:
        return []
    rows = stage.steps * stage.prompts
    part = Part(
        name=ON_POLICY,
        folder=ON_POLICY,
        domains=domains,
        work=Work(trained=rows, read=2 * rows, answers=rows),  # read by the student and by a teacher
        micro_batch=1,
        do=lambda parts: parts.distill_on_policy(domains),
        trains_on=[mine, to_dict(stage), distilled.trains_on if stage.model == DISTILLED else []],
    )
    return [part]


def _specialist(config: PosttrainConfig, name: str, source: Any) -> Part:
    knob = config.difficulty
    measured = sum(f"{name}-{mode}" not in knob.fixed for mode in config.modes)
    asked = knob.prompts * measured * min(2, knob.tries)  # the usual difficulty and a next one
    given = ("model", "tokens", "new_tokens", "result_tokens", "modes", "languages", "selection", "seed")
    begin = config.cold_of(name)
    tables = (config.reward, begin, config.difficulty, config.specialist)
    cold = Work(trained=begin.steps * begin.rows, read=asked, answers=asked * knob.samples)
    return Part(
        name=specialist_of(name),
        folder=f"specialists/{name}",
        domains=(name,),
        work=cold + _grpo_work(config.specialist),
        micro_batch=max(config.cold.micro_batch, config.specialist.micro_batch),
        do=lambda parts: parts.specialist(name),
        # of the judge the model alone: where it is, and its budget, may change
        trains_on=[source, [getattr(config, key) for key in given], config.judge.model, *map(to_dict, tables)],
    )


def _grpo_work(stage: GrpoConfig) -> Work:
    prompts = stage.steps * stage.prompts
    return Work(trained=prompts * stage.samples, read=prompts, answers=prompts * stage.samples)


def _settings(config: PosttrainConfig, plan: Sequence[Part]) -> dict[str, str]:
    """A digest for each part of all that decides its result, and one of what decides all figures."""
    decisive = {part.name: part.trains_on for part in plan}
    decisive[EVALUATION] = [config.evaluation, config.evaluations]  # a part that changes takes its own figures along
    return {
        name: hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
        for name, value in decisive.items()
    }


def _announce(console: Console, begin: float, part: str, needed: str) -> None:
    passed = f"[dim]{time.perf_counter() - begin:5.0f} s[/dim]"
    console.print(f"{passed}  [bold]{part}[/bold]: {needed}", highlight=False)


def _next(out: Path, name: str, added: Sequence[str]) -> str:
    """added: names of domains that may not be among those of the config."""
    if name == FINAL:
        return f"Next: tokensieve generate {quote(str(out / 'final' / stages.MODEL))} --chat 'Who are you?'"
    following = "rl" if name in (DISTILLED, ON_POLICY) else "distill"
    named = f", and {added[0]} among its domains" if added and added[0] not in DOMAINS else ""
    return f"Next, when all specialists are there: tokensieve {following} --out {quote(str(out))} {SAME}{named}"
