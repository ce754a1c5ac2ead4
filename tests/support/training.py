"""Tiny runs: a small text, its tokenizer, models of two layers, and configs that train them in a second."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokensieve
from tests.support import models
from tokensieve.config import DataConfig, OptimizerConfig, PhaseConfig, SourceConfig, TrainConfig
from tokensieve.data import train_tokenizer
from tokensieve.mesh import Mesh
from tokensieve.model import DecoderForCausalLM
from tokensieve.train import Run
from tokensieve.train.learning import learning

VOCAB = 320
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 256}
OPTIMIZER = OptimizerConfig(lr=3e-3, warmup_steps=2, indexer_lr=1e-2)
SHAPE = {**models.SHAPE, **SMALL}


def config(family: str = "v32", **changes: Any) -> Any:
    return models.config(family, **(SMALL | {"index_topk": 16} if family == "v32" else SMALL) | changes)


def model(family: str = "v32", seed: int = 0, **changes: Any) -> DecoderForCausalLM:
    return models.ours(config(family, **changes), seed)


@dataclass(frozen=True)
class Workplace:
    """A folder with text/, tokenizer/, sparse/ and dense/ (a model each), and runs/."""

    root: Path

    def data(self, **changes: Any) -> DataConfig:
        made = DataConfig(
            (SourceConfig(str(self.root / "text")),),
            tokenizer=str(self.root / "tokenizer"),
            cache=str(self.root / "cache"),
            held_out_share=0.0,
        )
        return replace(made, **changes)

    def run(self, stage: str, name: str, *phases: PhaseConfig, **changes: Any) -> TrainConfig:
        made = TrainConfig(
            stage=stage,
            model="" if stage == "pretrain" else str(self.root / "sparse"),
            out=str(self.root / "runs" / name),
            phases=phases or (PhaseConfig(steps=4, context=48, sequences=4, micro_batch=2),),
            data=self.data(),
            optimizer=OPTIMIZER,
            shape=SHAPE if stage == "pretrain" else {},
            device="cpu",
            track=(),
        )
        return replace(made, **changes)


def workplace(root: Path) -> Workplace:
    draw = random.Random(0)
    (root / "text").mkdir(parents=True)
    words = [f"{a}_{b}" for a in "alpha beta gamma delta".split() for b in "size name path rows".split()]
    texts = []
    for number in range(12):
        lines = [f"def {draw.choice(words)}_{i}({draw.choice(words)}):\n    return {i}\n" for i in range(20 + number)]
        texts.append(f'"""Module {number}."""\n' + "\n".join(lines))
        (root / "text" / f"module_{number}.py").write_text(texts[-1])
    train_tokenizer(texts, root / "tokenizer", VOCAB)
    for family, name in (("v32", "sparse"), ("v3", "dense")):
        made = model(family)
        made.folder = root / "tokenizer"  # so that it goes with the model
        tokensieve.save(made, root / name)
    return Workplace(root)


def batch(rows: int, length: int, seed: int = 0, documents: bool = False) -> dict[str, Tensor]:
    """A micro-batch of random tokens; with `documents`, every row is cut in two at another place."""
    ids = torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    positions, labels = torch.arange(length).repeat(rows, 1), ids.clone()
    labels[:, 0] = -100
    for row in range(rows if documents else 0):
        cut = 5 + row * 3 % (length - 10)
        positions[row, cut:] -= cut
        labels[row, cut] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def cut(whole: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    return [
        dict(zip(whole, values, strict=True)) for values in zip(*(x.chunk(parts) for x in whole.values()), strict=True)
    ]


class Still(torch.optim.SGD):
    """Keeps the gradients that a step would have used, by parameter, and changes nothing."""

    def __init__(self, parameters: list[torch.nn.Parameter]):
        super().__init__(parameters, lr=0.0)
        self.param_groups[0]["peak"] = 0.0
        self.kept: dict[torch.nn.Parameter, Tensor] = {}

    def step(self, closure: Any = None) -> None:
        self.kept = {p: p.grad.clone() for g in self.param_groups for p in g["params"] if p.grad is not None}


def step_gradients(
    run: TrainConfig, trained: DecoderForCausalLM, micro: list[dict[str, Tensor]], mesh: Mesh | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients, by name, and the figures of one step of our loop, unclipped unless the config clips."""
    this = Run(run, trained.train(), mesh=mesh)
    with this.divided(), learning(trained, this.stage.learners(run)):
        for name, parameter in trained.named_parameters():
            if ".lora_B." in name:
                parameter.data.fill_(0.01)  # at zero its A would have no gradient
        this.optimizer = optimizer = Still([p for p in trained.parameters() if p.requires_grad])
        figures = this.step(0, micro)
        return {n: optimizer.kept[p] for n, p in trained.named_parameters() if p in optimizer.kept}, figures


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of two sets of gradients, relative to each one's largest value."""
    assert a.keys() == b.keys() and a
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp_min(1e-12)) for n in a)


def indexers(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: g for n, g in gradients.items() if ".indexer." in n}
