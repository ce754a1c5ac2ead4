"""Plans beside what benchmarks/many_gpus.py measured on one and on two H200s, and the table of both in docs/plan.md."""

from dataclasses import replace
from pathlib import Path

import pytest

from tokensieve import cost
from tokensieve.config import PhaseConfig, TrainConfig
from tokensieve.cost.gpus import GPUS
from tokensieve.cost.paper import published_shape
from tokensieve.cost.plan import Job, PhasePlan, plan
from tokensieve.cost.train_rates import GROUPED, LITE, TrainRates

STACKS = {
    "v3": replace(published_shape(), layers=2, moe_layers=1, index_layers=2, experts=32, vocabulary=16384),
    "lite": cost.shape_of(LITE | {"num_hidden_layers": 4, "q_lora_rank": 1536}),
    "grouped": cost.shape_of(GROUPED | {"num_hidden_layers": 4, "vocab_size": 16384}),
}
SHARED = 131072  # tokens of a sequence that all GPUs share; of a shorter one each has its own
# Stack, step, tokens, GPUs, TFLOP of a step, seconds, peak in GiB.
CELLS = [
    ("v3", "adapt", 32768, 1, 409.2626, 1.3635, 67.52),
    ("v3", "adapt", 32768, 2, 818.5252, 1.3792, 55.04),
    ("v3", "adapt", 131072, 2, 1862.8937, 3.2284, 91.36),
    ("v3", "dense", 32768, 1, 560.4361, 2.3177, 60.63),
    ("v3", "warmup", 32768, 1, 273.8079, 0.9273, 26.79),
    ("v3", "warmup", 32768, 2, 547.6159, 0.9307, 27.68),
    ("v3", "warmup", 131072, 1, 3419.0495, 12.0222, 78.11),
    ("v3", "warmup", 131072, 2, 3419.0495, 6.3672, 63.76),
    ("lite", "adapt", 32768, 1, 154.4559, 1.1757, 48.08),
    ("lite", "adapt", 32768, 2, 308.9118, 1.2064, 32.00),
    ("lite", "adapt", 131072, 1, 727.6802, 5.7400, 74.64),
    ("lite", "adapt", 131072, 2, 727.6802, 2.9179, 40.74),
    ("lite", "dense", 32768, 1, 184.7890, 0.8437, 46.66),
    ("lite", "dense", 131072, 1, 1662.7459, 8.1247, 69.40),
    ("lite", "warmup", 32768, 1, 85.6435, 0.3619, 15.58),
    ("lite", "warmup", 32768, 2, 171.2871, 0.3729, 12.01),
    ("lite", "warmup", 131072, 1, 1082.2706, 4.4871, 27.46),
    ("lite", "warmup", 131072, 2, 1082.2706, 2.3877, 15.79),
    ("grouped", "adapt", 32768, 1, 197.6888, 1.6405, 21.19),
    ("grouped", "adapt", 32768, 2, 395.3776, 1.6477, 15.95),
    ("grouped", "adapt", 131072, 1, 898.9890, 8.7627, 44.87),
    ("grouped", "adapt", 131072, 2, 898.9890, 4.5006, 24.24),
    ("grouped", "warmup", 32768, 1, 134.5208, 0.4438, 8.09),
    ("grouped", "warmup", 32768, 2, 269.0416, 0.4585, 6.57),
    ("grouped", "warmup", 131072, 1, 1488.8859, 5.3297, 20.23),
    ("grouped", "warmup", 131072, 2, 1488.8859, 2.8611, 12.39),
]


def planned(stack: str, step: str, tokens: int, gpus: int) -> PhasePlan:
    context = gpus if tokens == SHARED else 1
    config = TrainConfig(
        "warmup" if step == "warmup" else "adapt",
        "",
        "",
        phases=(PhaseConfig(1, tokens, gpus // context),),
        selection=step != "dense",
        context_parallel=context,
        activation_checkpointing=True,
    )
    return plan(Job(config, STACKS[stack]), GPUS["h200"], gpus, TrainRates()).phases[0]


@pytest.mark.parametrize(("stack", "step", "tokens", "gpus", "tflop", "seconds", "gib"), CELLS)
def test_planned_and_measured(
    stack: str, step: str, tokens: int, gpus: int, tflop: float, seconds: float, gib: float
) -> None:
    """No peak is more than 5% above its plan, or less than three quarters of it. One GPU's time is the measured one.

    On two GPUs it is up to 7% longer than planned, since plans do not count waiting. The benchmark's random selections
    are the worst case, which grouped adaptation is not planned by: it takes 3 times as long.
    """
    found = planned(stack, step, tokens, gpus)
    assert found.model_flops / 1e12 == pytest.approx(tflop, rel=1e-6)
    assert 0.95 <= found.bytes / 2**30 / gib <= 1.35
    if (stack, step) == ("grouped", "adapt"):
        assert 2.8 < seconds / found.seconds < 3.2
    else:
        assert found.label == "measured"
        least, most = (0.999, 1.001) if gpus == 1 else (0.999, 1.08)
        assert least < seconds / found.seconds < most


def test_the_documents_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    for stack, step, tokens, gpus, _, seconds, gib in CELLS:
        found = planned(stack, step, tokens, gpus)
        shared = ", shared" if gpus > 1 and tokens == SHARED else ""
        row = f"| {stack} | {step} | {tokens:,}{shared} | {gpus} | {found.seconds:.2f}, {seconds:.2f} | "
        assert f"{row}{found.bytes / 2**30:.1f}, {gib:.1f} |" in text
