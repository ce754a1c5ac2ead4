"""Problems and rewards in the formats of verl: rows of its parquet files, and the function that it calls for a score.

Nothing here imports verl, whose processes import this module (`pkg://tokensieve.posttrain.verl`). The config is
integrations/verl/grpo.yaml.

Source: verl's documentation, "Prepare data for post-training" and "Implement reward function for dataset".
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dacite

from tokensieve.config import UserError
from tokensieve.posttrain.language import LanguageShare
from tokensieve.posttrain.rewards import Terms, Weights, reward
from tokensieve.tasks import Answer
from tokensieve.tasks.documents import Split
from tokensieve.tasks.problems import Item, Problem, Problems, domain, split_thinking


def rows_of(name: str, examples: Sequence[Problem], split: Split) -> list[dict[str, Any]]:
    """The rows of verl's parquet file. name: that under which `domain` finds the problems' domain, in every process.

    UserError for problems that only a judge can score, since verl has no missing reward, and for those that are more
    than texts: with tools, or of a user's own `Task`.
    """
    rows = []
    for number, example in enumerate(examples):
        if not example.item.data:
            raise UserError(f"{name}: a judge alone can score {example.name}, and verl has no missing reward; use TRL")
        if type(example.item) is not Item or bool(getattr(example.item, "steps", ())):
            raise UserError(f"{name}: {example.name} has tools or objects, which are not handed to verl; use TRL")
        messages: Any = example.prompt
        rows.append(
            {
                "data_source": name,
                "prompt": [dict(message) for message in messages],
                "ability": example.domain,
                "reward_model": {"style": "rule", "ground_truth": json.dumps(asdict(example.item))},
                "extra_info": {
                    "index": number, "split": split, "mode": example.mode, "language": example.language,
                },
            }
        )  # fmt: skip
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a parquet file that verl's RLHFDataset reads."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any],
    weights: Mapping[str, float] | None = None,
    **_: Any,
) -> dict[str, float]:
    """What an answer to a row of `rows_of` is worth: "score" is the reward, the others are its terms, which verl logs.

    weights: of `Weights`, from verl's `reward_kwargs`. The penalty of length is verl's own: its "dapo" manager has the
    same function. verl does not tell if an answer ended, so one that was cut off is graded as it stands.
    """
    weighed = Weights(**(weights or {}))
    mode, language = extra_info["mode"], extra_info["language"]
    item = dacite.from_dict(Item, json.loads(ground_truth), dacite.Config(cast=[tuple]))
    example = Problem(
        name=item.key, prompt="", domain=data_source, mode=mode, language=language, item=item, demonstration=""
    )
    thoughts, text = split_thinking(solution_str)
    terms = Terms(
        outcome=_task(data_source, mode, language).reward(example, Answer(solution_str)),
        language=_shares()(f"{thoughts or ''}\n{text}", language) if weighed.language else None,
    )
    found = reward(terms, weighed, needed=("outcome",))
    assert found is not None  # the outcome is known
    logged = {name: value for name, value in asdict(terms).items() if value is not None}
    return {"score": found, "acc": float(terms.outcome == 1)} | logged


@functools.cache
def _task(name: str, mode: Any, language: str) -> Problems:
    no_encoder: Any = None  # a reward encodes nothing
    return Problems(domain(name), no_encoder, mode, language)


@functools.cache
def _shares() -> LanguageShare:
    return LanguageShare()
