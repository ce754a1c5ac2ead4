"""The specialists' answers as data: sampled, filtered by the verifier, deduplicated, balanced, and kept as JSON lines.

Legend of a line: {"group", "specialist", "problem": its name, "score", "prompt" and "answer": token ids, "written":
for each of the answer's 1 if the model wrote it, 0 for results of tools, "text": what it wrote}.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import chain, cycle, islice, zip_longest
from pathlib import Path
from typing import Any

from datasets import Dataset

from tokensieve.config import UserError
from tokensieve.files import write_text
from tokensieve.posttrain.groups import Group
from tokensieve.posttrain.outcomes import demonstrations_of
from tokensieve.posttrain.sampled import Sampled
from tokensieve.posttrain_config import DistillConfig
from tokensieve.tasks import PlainEncoder

Line = dict[str, Any]
Row = dict[str, list[int]]


def lines_of(found: Sequence[Sequence[Sampled]], specialist: str) -> list[Line]:
    """All that a specialist answered."""
    return [
        {
            "group": sampled.group,
            "specialist": specialist,
            "problem": sampled.example.name,
            "score": sampled.score,
            "prompt": list(sampled.rollout.prompt),
            "answer": list(sampled.rollout.answer),
            "written": [int(wrote) for wrote in sampled.rollout.mask],
            "text": "\n".join((*sampled.answer.earlier, sampled.answer.text)),
        }
        for answers in found
        for sampled in answers
    ]


def write_lines(path: Path, lines: Iterable[Line]) -> None:
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_lines(path: Path) -> list[Line]:
    """UserError if a line is not one of ours."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            whole = {"group", "problem", "score", "prompt", "answer", "written", "text"} <= line.keys()
            whole = whole and len(line["written"]) == len(line["answer"]) and {*line["written"]} <= {0, 1}
            whole = whole and all(type(token) is int for token in (*line["prompt"], *line["answer"]))
        except (ValueError, AttributeError, TypeError):
            whole = False
        if not whole:
            raise UserError(f"{path}:{number}: no answer of a specialist; remove the file to sample it again")
        lines.append(line)
    return lines


def chosen(lines: Iterable[Line], config: DistillConfig) -> list[Line]:
    """At most `config.keep` answers that passed, no two alike: first one to each problem, then second ones."""
    by_problem: dict[str, dict[str, Line]] = {}
    for line in lines:
        if line["score"] >= config.passing:
            by_problem.setdefault(line["problem"], {}).setdefault(line["text"].strip(), line)
    rounds = zip_longest(*(answers.values() for answers in by_problem.values()))
    return [line for line in chain.from_iterable(rounds) if line is not None][: config.keep]


def training_rows(
    groups: Sequence[Group], lines: Sequence[Line], config: DistillConfig, encode: PlainEncoder, seed: int
) -> tuple[Dataset, list[Line], dict[str, dict[str, int]]]:
    """The rows to train on, the lines among them, and by group {"sampled", "passed", "kept", "demonstrations"}.

    If `config.fill` is "demonstrations", a group with fewer than `config.keep` answers gets demonstrations for the
    others, as far as its problems have any. Rows of a group that has fewer than another are repeated until it has as
    many, each at most `config.repeat` times. UserError if nothing is left to train on.
    """
    counts: dict[str, dict[str, int]] = {}
    kept: list[Line] = []
    by_group: list[list[Row]] = []
    for group in groups:
        own = [line for line in lines if line["group"] == group.name]
        best = chosen(own, config)
        missing = config.keep - len(best) if config.fill == "demonstrations" else 0
        examples = [e for e in group.examples("train", missing, seed) if e.item.answer] if missing else []
        shown = demonstrations_of(examples, encode).to_list() if examples else []
        passed = sum(line["score"] >= config.passing for line in own)
        counts[group.name] = {
            "sampled": len(own), "passed": passed, "kept": len(best), "demonstrations": len(shown)
        }  # fmt: skip
        kept += best
        by_group.append([*map(row_of, best), *shown])
    rows = balanced(by_group, config.repeat)
    if not rows:
        raise UserError(
            f"no answer of a specialist scores {config.passing} or more; train the specialists longer, lower "
            'distill.passing, or set distill.fill = "demonstrations"'
        )
    return Dataset.from_list(rows), kept, counts


def balanced(by_group: Sequence[Sequence[Row]], repeat: int) -> list[Row]:
    """All rows. Those of smaller groups come again, until these have as many as the largest, or `repeat` times each."""
    most = max(map(len, by_group), default=0)
    return [row for rows in by_group for row in islice(cycle(rows), min(most, repeat * len(rows)))]


def check_tokens(lines: Iterable[Line], vocabulary: int) -> None:
    """UserError if an answer has tokens that a model with this vocabulary lacks."""
    for line in lines:
        strange = [token for token in (*line["prompt"], *line["answer"]) if not 0 <= token < vocabulary]
        if strange:
            raise UserError(
                f"an answer in {line['group']} has token {strange[0]}, and the model's vocabulary has {vocabulary}: it "
                "was sampled with another tokenizer; remove its file to sample it again"
            )


def row_of(line: Line) -> Row:
    """What is trained of a line."""
    prompt, answer = line["prompt"], line["answer"]
    return {"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + line["written"]}
