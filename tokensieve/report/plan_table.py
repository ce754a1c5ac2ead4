"""Output of `tokensieve plan`: the contents of plan.json, and tables for a terminal."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tokensieve import cost
from tokensieve.cost.plan import PhasePlan, StagePlan, usable
from tokensieve.cost.train_memory import ACTIVATIONS
from tokensieve.report.table import table


@dataclass(frozen=True)
class NamedPlan:
    """A plan and its names. config, model: as they were given. commands: those that start it."""

    config: str
    model: str
    plan: StagePlan
    commands: tuple[str, ...]


def plan_figures(plans: Sequence[NamedPlan], price: float) -> dict[str, Any]:
    """The contents of plan.json: every part of every phase, in bytes, seconds and dollars."""
    hours = sum(named.plan.gpu_hours for named in plans)
    return {
        "usd_per_gpu_hour": price,
        "gpu_hours": hours,
        "usd": hours * price,
        "stages": [_stage(named, price) for named in plans],
    }


def _stage(named: NamedPlan, price: float) -> dict[str, Any]:
    plan = named.plan
    return {
        "config": named.config,
        "model": named.model,
        "stage": plan.config.stage,
        "gpu": asdict(plan.gpu),
        "gpus": plan.ranks.gpus,
        "context_parallel": plan.ranks.context,
        "expert_parallel": plan.ranks.experts,
        "activation_checkpointing": plan.config.activation_checkpointing,
        "adapters": None if plan.job.adapters is None else asdict(plan.job.adapters),
        "activation_bytes": {"recomputed": plan.activations(True), "kept": plan.activations(False)},
        "memory_bytes": plan.heaviest.bytes,
        "host_memory": [asdict(held) for held in plan.host],
        "usable_bytes": usable(plan.gpu),
        "tokens": plan.tokens,
        "seconds": plan.seconds,
        "gpu_hours": plan.gpu_hours,
        "usd": plan.gpu_hours * price,
        "mfu": plan.mfu,
        "label": plan.label,
        "commands": named.commands,
        "phases": [_phase(phase) for phase in plan.phases],
    }


def _phase(phase: PhasePlan) -> dict[str, Any]:
    return {
        **asdict(phase.phase),
        "memory": [asdict(held) for held in phase.memory],
        "memory_bytes": phase.bytes,
        "parts": [asdict(part) for part in (*phase.parts, phase.exchange)],
        "traffic": [asdict(traffic) for traffic in phase.traffic],
        "model_flops": phase.model_flops,
        "step_seconds": phase.seconds,
        "bound": phase.bound,
        "label": phase.label,
    }


def show_plan(console: Console, plans: Sequence[NamedPlan], price: float) -> None:
    """Prints a table for each stage, and the commands that start it."""
    for named in plans:
        plan, ranks = named.plan, named.plan.ranks
        divided = [f"context_parallel {ranks.context}"] if ranks.context > 1 else []
        divided += [f"expert_parallel {ranks.experts}"] if ranks.experts > 1 else []
        divided += [f"LoRA of rank {plan.job.adapters.rank}"] if plan.job.adapters is not None else []
        console.print(
            f"{named.config}: {plan.config.stage} of {named.model} on {_count(ranks.gpus, plan.gpu.name)} at "
            f"{price:g} USD an hour{''.join(f'; {text}' for text in divided)}",
            highlight=False,
        )
        size = plan.heaviest.phase
        longest = f", {size.micro_batch:,} x {size.context:,} tokens at a time" if len(plan.phases) > 1 else ""
        rows = table(f"one GPU{longest}", "", "label")
        for held in plan.heaviest.memory:
            if held.bytes:
                rows.add_row(held.name, _bytes(held.bytes), held.origin)
            if held.name == ACTIVATIONS and plan.config.stage != "warmup":
                recomputes = plan.config.activation_checkpointing
                other = "without recomputation" if recomputes else "with recomputation"
                rows.add_row(f"({other})", f"({_bytes(plan.activations(not recomputes))})", held.origin)
        rows.add_row(f"together, of {usable(plan.gpu) / 1e9:.1f} GB", _bytes(plan.heaviest.bytes), "")
        for held in plan.host:
            rows.add_row(f"on the host: {held.name}", _bytes(held.bytes), held.origin)
        for phase in plan.phases:
            _add_step(rows, phase)
        steps = sum(phase.phase.steps for phase in plan.phases)
        schedule = f"all {steps:,} steps, {plan.tokens / 1e9:,.4g} billion tokens"
        rows.add_row(schedule, cost.duration(plan.seconds), plan.label)
        rows.add_row("GPU-hours", _number(plan.gpu_hours), plan.label)
        rows.add_row("USD", _number(plan.gpu_hours * price), plan.label)
        rows.add_row("model FLOPs of the bf16 peak", f"{plan.mfu:.0%}", plan.label)
        console.print(rows)
        for command in named.commands:
            console.print(f"  {command}", highlight=False, soft_wrap=True)
    if len(plans) > 1:
        hours = sum(named.plan.gpu_hours for named in plans)
        console.print(f"together: {_number(hours)} GPU-hours, {_number(hours * price)} USD", highlight=False)


def _add_step(rows: Table, phase: PhasePlan) -> None:
    """Adds the parts of a step to the table."""
    size = phase.phase
    for part in (*phase.parts, phase.exchange):
        if part.seconds:
            beside = ", beside the rest" if part is phase.exchange else ""
            rows.add_row(f"{part.name}{beside}", _seconds(part.seconds), part.label)
    rows.add_row(f"a step of {size.sequences:,} x {size.context:,} tokens", _seconds(phase.seconds), phase.label)


def _count(gpus: int, name: str) -> str:
    return f"one {name}" if gpus == 1 else f"{gpus:,} {name}"


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 5e7 else f"{size / 1e6:,.1f} MB"


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.1f} ms"
