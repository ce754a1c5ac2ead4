"""What a command says before torch is loaded: its help with the config's keys, completion, and refusals."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import commands
from tokensieve import cli

KEYS = {
    "warmup": ["optimizer.lr=0.001", "phases.0.steps=200", 'track=["tensorboard"]', "optimizer.indexer_lr (none)"],
    "adapt": ["data.sources.0.source=", "selection=true"],
    "pretrain": ["shape.hidden_size=256", "shape.rope_parameters.factor=4.0"],
    "demo": ["top_k=256", "warmup.phases.1.context=2048", "heat_lengths=[1024]"],
    "speedrun": ["pretrain.optimizer.lr=", "evaluate.sparse.texts="],
    "posttrain": [
        "cold.rows=1",
        "rl.train.samples=2",
        "reward.outcome=1.0",
        'judge.model="scripted"',
        "posttrain_config.py",
    ],
    "eval": ["sparse.contexts=[8192]", "base.needles=", "long.keys=16", "short.tokens=512"],
    "share": ["context=4096", "texts=4"],
    "profile": ["mass=", "top_k=[128, 256", "index_heads (none)"],
}


@pytest.mark.parametrize("command", KEYS)
def test_the_help_lists_the_configs_keys(run: Any, command: str) -> None:
    ended = run(command, "--help")
    assert ended.status == 0 and all(key in ended.out for key in KEYS[command]), ended.out


def test_completion(run: Any, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--install-completion" in run("--help").out
    monkeypatch.setenv("_TOKENSIEVE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "tokensieve spa")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit):
        cli.app(prog_name="tokensieve")
    assert capsys.readouterr().out.split() == ["sparsify"]


def test_text_without_an_option(run: Any) -> None:
    refused = commands.refusal(run)
    refused(("'some text'", "--prompt TEXT"), "generate", "base", "some text")
    refused(("'two words'", "--prompt TEXT"), "generate", "base", "two", "words", "--max-new-tokens", "3")
    refused(("--prompt TEXT",), "generate", "some text")  # in the place of the model


REFUSALS = [
    ("generate", "nowhere", "--prompt", "x"),
    ("generate", "base"),
    ("generate", "base", "text"),
    ("generate", "base", "--prompt", "x", "--selection", "best"),
    ("generate", "base", "--prompt", "x", "--selection", "no_such_module:select"),
    ("generate", "base", "--prompt", "x", "--device", "tpu"),
    ("generate", "base", "--input-file", "nowhere.txt"),
    ("warmup",),
    ("warmup", "--model", "nowhere"),
    ("warmup", "--config", "nowhere"),
    ("warmup", "--config", "adapt"),
    ("warmup", "--model", "sparse", "--set", "device=tpu"),
    ("adapt", "--selection", "best"),
    ("adapt", "--model", "sparse", "--set", "selection=best"),
    ("warmup", "--model", "sparse", "--set", "data.sources.0.source=nowhere"),
    ("warmup", "--model", "sparse", "--set", "data.sources.0.source=nowhere.csv#text"),
    ("eval", "sparse", "--data", "nowhere"),
    ("demo", "--set", "model=nowhere"),
    ("speedrun", "--set", "nothing=1"),
    ("posttrain", "--config", "huge"),
    ("posttrain", "--model", "nowhere"),
    ("rl", "--set", "cold.rows=0"),
    ("distill", "--set", 'domains=["alchemy"]'),
    ("specialist", "--domain", "alchemy"),
    ("sparsify", "nowhere", "new"),
    ("sparsify", "base", "."),
    ("eval", "nowhere"),
    ("eval", "sparse", "--arm", "best"),
    ("eval", "sparse", "--before", "base"),
    ("eval", "sparse", "--before", "nowhere", "--suite", "short"),
    ("eval", "sparse", "--context", "64", "--suite", "short"),
    ("eval", "sparse", "--arm", "mine=window", "--suite", "parity"),
    ("eval", "sparse", "--resume", "--suite", "short"),
    ("eval", "sparse", "--set", "parity.texts=0"),
    ("report", "nowhere"),
    ("eval", "sparse", "--arm", "mine=best"),
    ("eval", "sparse", "--arm", "mine=no_such_module:select"),
    ("profile", "nowhere"),
    ("profile", "retrieval"),
    ("profile", ".", "--model", "nowhere"),
    ("profile", ".", "--set", "mass=2"),
    ("profile", ".", "--set", "top_k=[512, 256]"),
    ("plan", "nowhere"),
    ("plan", "adapt"),
    ("convert", "nowhere", "new"),
    ("convert", "base", "new"),
    ("deploy", "vllm", "nowhere"),
    ("serve", "nowhere"),
    ("bench", "serve", "nowhere"),
    ("bench", "serve", "--selection", "best"),
    ("bench", "serve", "--requests", ","),
]


def test_what_can_be_refused_without_torch_is(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")  # the folder of an adapter
    refusals = [*REFUSALS, ("generate", str(tmp_path), "--prompt", "x"), ("warmup", "--model", str(tmp_path))]
    code = f"""
import sys
from tokensieve.cli import main
for arguments in {refusals!r}:
    try:
        main(arguments)
    except SystemExit as ended:
        assert ended.code == 2, (arguments, ended.code)
    else:
        raise AssertionError(arguments)
    assert not {{"torch", "transformers"}} & set(sys.modules), arguments
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("tokensieve: error: ") == len(refusals), ended.stderr
