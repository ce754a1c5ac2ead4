"""The phase and the learning rate of a step."""

import math
from dataclasses import replace
from typing import NamedTuple

from tokensieve.config import OptimizerConfig, PhaseConfig, UserError


class SchedulePosition(NamedTuple):
    phase: int
    step: int  # within the phase
    sequence: int  # first sequence of the step within the phase


def position(phases: tuple[PhaseConfig, ...], step: int) -> SchedulePosition:
    for number, phase in enumerate(phases):
        if step < phase.steps:
            return SchedulePosition(number, step, step * phase.sequences)
        step -= phase.steps
    raise ValueError(f"step {step} is past the end of the run")


def total_steps(phases: tuple[PhaseConfig, ...]) -> int:
    return sum(phase.steps for phase in phases)


def extends(phases: tuple[PhaseConfig, ...], earlier: tuple[PhaseConfig, ...]) -> bool:
    """Whether `phases` are the `earlier` ones with more steps in the last of them, or with further phases after it.

    Sequences of a phase do not depend on its number of steps, so the earlier steps read the same.
    """
    last = len(earlier) - 1
    if last < 0 or len(phases) <= last or phases[:last] != earlier[:last]:
        return False
    steps = phases[last].steps
    return steps >= earlier[last].steps and replace(earlier[last], steps=steps) == phases[last]


def lr_share(optimizer: OptimizerConfig, phases: tuple[PhaseConfig, ...], step: int) -> float:
    """The learning rate as a share of its peak: linear warm-up, then a half cosine to `lr_end`; times `lr_scale`."""
    total = total_steps(phases)
    warm = optimizer.warmup_steps
    if step < warm:
        share = (step + 1) / warm
    else:
        progress = (step - warm) / max(1, total - warm)
        share = optimizer.lr_end + (1 - optimizer.lr_end) * 0.5 * (1 + math.cos(math.pi * progress))
    number, inside, _ = position(phases, step)
    phase = phases[number]
    end = phase.lr_scale if phase.lr_scale_end is None else phase.lr_scale_end
    return share * (phase.lr_scale + (end - phase.lr_scale) * inside / max(1, phase.steps - 1))


def check_phases(phases: tuple[PhaseConfig, ...]) -> None:
    if not phases:
        raise UserError("the run has no phases: give at least one [[phases]] table")
    for phase in phases:
        for name in ("steps", "context", "sequences", "micro_batch"):
            if getattr(phase, name) < 1:
                raise UserError(f"phases.{name} is {getattr(phase, name)}; it must be at least 1")
        if phase.sequences % phase.micro_batch:
            raise UserError(
                f"phases: {phase.sequences} sequences do not divide into micro-batches of {phase.micro_batch}"
            )
