"""Values of config files and of `--set`, and the line that refuses one."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tokensieve.config import TrainConfig, UserError, from_dict, load_config, set_value


@dataclass(frozen=True)
class Inner:
    rate: float = 0.0


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    rates: tuple[float, ...] = ()
    name: str = ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (".5", 0.5),
        ("1.", 1.0),
        ("-.5", -0.5),
        ("+1.e-4", 1e-4),
        ("1e-4", 1e-4),
        ("2", 2),
        ("two.", "two."),
        ("Infinity", "Infinity"),
        ("1.2.3", "1.2.3"),
        ("007", "007"),
    ],
)
def test_what_set_reads(text: str, value: Any) -> None:
    raw: dict[str, Any] = {}
    set_value(raw, f"inner.rate={text}")
    assert raw == {"inner": {"rate": value}} and type(raw["inner"]["rate"]) is type(value)


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ({"inner": {"rate": True}}, '"inner.rate" - should be "float" instead of value "True"'),
        ({"inner": {"rate": 10**400}}, "inner.rate is beyond 9223372036854775807, the largest whole number"),
        ({"rates": [1, -(10**400)]}, "rates is beyond 9223372036854775807, the largest whole number"),
        ({"inner": {"rate": "0.5"}}, '"inner.rate" - should be "float"'),
        ({"rates": [1, False]}, '"rates" - should be "float" instead of value "False"'),
    ],
)
def test_what_is_no_number_is_refused_by_its_key(raw: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        from_dict(Outer, raw, "x.toml")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("optimizer.lr=-1", "optimizer.lr is -1.0; give a finite number of at least 0"),
        ("optimizer.lr=nan", "optimizer.lr is nan"),
        ("optimizer.indexer_lr=inf", "optimizer.indexer_lr is inf"),
        ("optimizer.clip=-1", "optimizer.clip is -1.0; give a finite number of at least 0"),
        ("optimizer.indexer_clip=nan", "optimizer.indexer_clip is nan"),
        ("seed=-1", "seed is -1; it must be at least 0"),
        ("save_every=-1", "save_every is -1; it must be at least 0"),
    ],
)
def test_numbers_of_training_that_mean_nothing(change: str, line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        load_config(TrainConfig, "warmup", (change,))


def test_digits_without_end(tmp_path: Path) -> None:
    """Python reads no integer of so many digits."""
    path = tmp_path / "x.toml"
    path.write_text(f"[inner]\nrate = {'9' * 5000}\n")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config(Outer, str(path))
    path.write_text("")
    with pytest.raises(UserError, match=re.escape('"inner.rate" - should be "float"')):
        load_config(Outer, str(path), (f"inner.rate={'9' * 5000}",))
