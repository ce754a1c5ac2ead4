"""What verl reads and calls: its documented row, and a score that is our own reward."""

import importlib.util
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from datasets import load_dataset

import tokensieve
from tokensieve.config import UserError
from tokensieve.posttrain import LanguageShare
from tokensieve.posttrain.verl import compute_score, rows_of, write_rows
from tokensieve.tasks import Answer, encoder
from tokensieve.tasks.problems import DOMAINS, Problems, domain

ROOT = Path(__file__).resolve().parents[2]
OFF = {"language": 0.0}


@pytest.fixture(scope="module")
def encode():
    return encoder(tokensieve.load_tokenizer("base"))


def score(row: dict[str, Any], text: str, weights: dict[str, float] = OFF) -> dict[str, float]:
    """As verl calls it."""
    extra = row["extra_info"] | {"num_turns": None, "rollout_reward_scores": {}}
    return compute_score(
        data_source=row["data_source"], solution_str=text, ground_truth=row["reward_model"]["ground_truth"],
        extra_info=extra, weights=weights,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["think", "direct"])
@pytest.mark.parametrize("name", ["mathematics", "logic", "writing"])
def test_rows_come_back_and_are_scored_as_our_reward(name: str, mode: Any, tmp_path: Path, encode) -> None:
    task = Problems(DOMAINS[name], encode, mode, tokens=300)
    examples = task.examples("test", 3)
    write_rows(tmp_path / "a" / "test.parquet", rows_of(name, examples, "test"))
    rows = list(load_dataset("parquet", data_files=str(tmp_path / "a" / "test.parquet"), cache_dir=tmp_path)["train"])
    for row, example in zip(rows, examples, strict=True):
        assert row.keys() == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
        assert row["prompt"] == example.prompt and row["reward_model"]["style"] == "rule"
        for text in (example.demonstration, example.item.answer, example.item.question, "", "</think>"):
            found = score(row, text)
            assert found["score"] == found["outcome"] == task.reward(example, Answer(text)), text
            assert found["acc"] == float(found["outcome"] == 1)
    assert score(rows[0], examples[0].demonstration)["score"] == 1


def test_terms_are_weighed(encode) -> None:
    (example,) = Problems(DOMAINS["logic"], encode, "think").examples("train", 1)
    (row,) = rows_of("logic", [example], "train")
    text = f"<think>Ich denke, dass das die Lösung der Aufgabe ist.</think>{example.item.answer}"
    share = LanguageShare()("Ich denke, dass das die Lösung der Aufgabe ist.\n" + example.item.answer, "en")
    found = score(row, text, {"language": 0.5, "outcome": 2.0})
    assert found["language"] == share and found["score"] == 2 + 0.5 * share
    with pytest.raises(TypeError, match="wit"):
        score(row, text, {"wit": 1.0})


def test_what_verl_cannot_honour_is_refused(tmp_path: Path, encode) -> None:
    path = tmp_path / "moving.jsonl"
    path.write_text("".join(f'{{"prompt": "Write {n}.", "rubric": ["It is moving."]}}\n' for n in range(20)))
    with pytest.raises(UserError, match=r"a judge alone can score .*, and verl has no missing reward"):
        rows_of(str(path), Problems(domain(str(path)), encode).examples("train", 1), "train")
    with pytest.raises(UserError, match="</think> is a special token, which verl cuts out"):
        prompts().write(tmp_path, "base", ["logic"], "think", "en", 0, {"train": 1}, 0)


def test_the_script_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [str(tmp_path), "--tokenizer", "base", "--domain", "logic", "--domain", "writing"]
    monkeypatch.setattr("sys.argv", ["prompts.py", *asked, "--rows", "3", "--test-rows", "2", "--tokens", "0"])
    script = prompts()
    with pytest.raises(SystemExit) as ended:
        script.typer.run(script.main)
    assert ended.value.code == 0
    files = {path.stem: pyarrow.parquet.read_table(path).to_pylist() for path in tmp_path.glob("*.parquet")}
    assert {name: [row["data_source"] for row in rows] for name, rows in files.items()} == {
        "train": ["logic"] * 3 + ["writing"] * 3,
        "test": ["logic"] * 2 + ["writing"] * 2,
    }


def prompts() -> Any:
    spec = importlib.util.spec_from_file_location("prompts", ROOT / "integrations" / "verl" / "prompts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
