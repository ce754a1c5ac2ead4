"""The commands as a user types them: their help, and one whole pass over the road on a tiny model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

import tokensieve
from tests.support import commands, models
from tests.support.commands import tiny
from tokensieve.files import written

COMMANDS = (
    "demo doctor pretrain speedrun sparsify warmup adapt specialist distill rl posttrain eval share profile cost plan "
    "report generate convert deploy serve bench"
).split()
BENCHES = ["bench serve"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return commands.make_home(tmp_path_factory.mktemp("cli"))


# help


@pytest.mark.parametrize("command", [*COMMANDS[:-1], *BENCHES])
def test_help_has_an_example_that_fits(run, command: str) -> None:
    ended = run(*command.split(), "--help")
    assert ended.status == 0 and not ended.err
    example = re.search(rf"Example: tokensieve {command} ?(.*)", ended.out)
    assert example, ended.out
    for option in re.findall(r"--[a-z-]+", example[1]):
        assert ended.out.count(option) > 1, f"{command}: the example's {option} is no option of it"


def test_every_command_is_known_here(run) -> None:
    ended = run("--help")
    assert ended.status == 0 and set(COMMANDS) == set(re.findall(r"^│ ([a-z]+)  ", ended.out, re.MULTILINE))
    ended = run("bench", "--help")
    assert set(BENCHES) == {f"bench {name}" for name in re.findall(r"^│ ([a-z]+)  ", ended.out, re.MULTILINE)}


def test_help_loads_no_torch() -> None:
    code = (
        "import sys, tokensieve.cli as c\ntry: c.main(['warmup', '--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("sparsify", "base"),
        ("warmup", "--steps", "3"),
        ("serve", "--port", "70000"),
        ("train",),
        ("generate", "base", "--prompt", "x", "--max-new-tokens", "0"),
    ],
)
def test_wrong_usage_is_status_2(run, arguments: tuple[str, ...]) -> None:
    ended = run(*arguments)
    assert ended.status == 2 and "Usage" in ended.err and "Traceback" not in ended.err


# the whole pass


@pytest.mark.parametrize("data", ["text", "random"])
def test_an_indexer_from_the_attention(run, home: Path, tmp_path: Path, data: str) -> None:
    """Text is read by the model's tokenizer, the same in every run; random tokens need none."""
    source = home / "text" if data == "text" else data
    arguments = (*commands.SMALL, "--init", "attention", "--init-data", source)
    for out in ("a", "b"):
        assert run("sparsify", home / "dense", tmp_path / out, *arguments).status == 0
    a, b = (commands.listing(tmp_path / out)["model.safetensors"] for out in ("a", "b"))
    assert a == b
    drawn, made = tokensieve.load(home / "sparse").state_dict(), tokensieve.load(tmp_path / "a").state_dict()
    changed = {name.split(".indexer.")[-1] for name, x in made.items() if not torch.equal(x, drawn[name])}
    assert changed == {"wq_b.weight", "wk.weight", "k_norm.bias", "weights_proj.weight"}


def test_one_pass_over_the_road(run, home: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run("sparsify", home / "dense", "untrained", *commands.SMALL, "--index-dtype", "fp8")
    assert ended.status == 0 and "Next: tokensieve warmup --model untrained" in ended.out
    assert tokensieve.load("untrained").config.index_dtype == "fp8"

    ended = run(*tiny(home, "warmup", Path("w"), "--model", "untrained"))
    assert ended.status == 0 and "w/step-000003" in ended.out and "GiB" in ended.err  # the estimate is logged
    metrics = json.loads(Path("w/metrics.json").read_text())
    assert metrics["stage"] == "warmup" and metrics["steps"] == 3 and metrics["tokens"] == 3 * 2 * 64
    assert set(metrics["kl"]) == {"first", "last"}

    ended = run(*tiny(home, "adapt", Path("a"), "--model", "w/step-000003", "--set", "phases.0.steps=2"))
    assert ended.status == 0 and set(json.loads(Path("a/metrics.json").read_text())) >= {"lm", "kl"}

    few = {"needles": [16], "prompts_per_decile": 1, "sequences": 1, "completions": 1, "answers": 1, "new_tokens": 8}
    sizes = [word for key, value in few.items() for word in ("--set", f"base.{key}={value}")]
    data = ("--data", home / "text" / "*.py", "--context", "1500")
    monkeypatch.setattr("tokensieve.data.sources.is_held_out", lambda name, share: name < "p")
    ended = run("eval", "a/step-000002", "--quick", *data, "--arm", "[/mine]=window")
    assert ended.status == 0, ended
    assert "oracle" in ended.out and "runs/eval-a-step-000002/metrics.json" in ended.out
    assert "as sparse, but window selects" in ended.out and "[/mine]" in ended.out
    figures = json.loads(Path("runs/eval-a-step-000002/metrics.json").read_text())
    assert set(figures) >= {"dense", "sparse", "window", "oracle", "recall", "top_k", "context", "seconds"}
    assert figures["[/mine]"] == figures["window"]

    def broken(*_: object) -> None:
        raise tokensieve.UserError("the terminal is gone")

    with monkeypatch.context() as patch:
        patch.setattr("tokensieve.evals.judge_sparse", lambda *_, **__: dict(figures))  # they are measured already
        patch.setattr("tokensieve.report.show", broken)
        ended = run("eval", "a/step-000002", "--quick", *data, "--out", "kept")
    assert ended.status == 2 and "terminal is gone" in ended.err
    assert json.loads(Path("kept/metrics.json").read_text())["[/mine]"] == figures["window"]

    ended = run("eval", home / "dense", "--quick", "--out", "e", *data, *sizes)
    assert ended.status == 0 and set(json.loads(Path("e/metrics.json").read_text())) >= {"needles", "criteria", "chat"}


def test_the_suites(run, home: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = ("--quick", "--data", home / "text" / "*.py", "--held-out-share", "1")
    few = {"tasks": ["single"], "prompts": 1, "texts": 1, "contexts": [400]}
    sizes = [word for key, value in few.items() for word in ("--set", f"long.{key}={json.dumps(value)}")]
    ended = run(
        "eval", home / "sparse", "--suite", "long", "--context", "300", *data, *sizes, "--arm", "[/mine]=window"
    )
    assert ended.status == 0, ended
    assert "[/mine] k=24" in ended.out and "runs/eval-sparse-long/metrics.json" in ended.out
    figures = json.loads(Path("runs/eval-sparse-long/metrics.json").read_text())["long"]
    assert {row["context"] for row in figures["tasks"]} == {300} and len(figures["positions"]["ppl"]) == 5
    short = ("--set", "short.prompts=2", "--set", "short.texts=1", "--set", "short.tokens=100")
    ended = run("eval", home / "sparse", "--suite", "short", *data, *short, "--before", home / "dense")
    assert ended.status == 0 and "chance is 25%" in ended.out
    figures = json.loads(Path("runs/eval-sparse-short/metrics.json").read_text())
    assert [row["arm"] for row in figures["short"]["texts"]] == ["before", "model"] and figures["seconds"] > 0
    tokensieve.save(models.ours(models.config("v3", vocab_size=300, num_hidden_layers=1)), tmp_path / "other")
    ended = run("eval", home / "sparse", "--suite", "short", *data, *short, "--before", tmp_path / "other")
    assert ended.status == 2 and "but the model's vocabulary is 300" in ended.err, ended


def test_parity_goes_on_and_is_reported(run, home: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = {"texts": 1, "written": 2, "tasks": [], "top_k": [24], "recall_queries": 4}
    sizes = [word for key, value in few.items() for word in ("--set", f"parity.{key}={json.dumps(value)}")]
    command = ("eval", home / "sparse", "--suite", "parity", "--data", home / "text" / "*.py", "--held-out-share", "1")
    ended = run(*command, *sizes, "--context", "24")
    assert ended.status == 2 and "not longer than k = 24" in ended.err and "nothing can be called parity" in ended.err
    ended = run(*command, *sizes, "--context", "120")
    assert ended.status == 0 and "k = 24: undecided, too few prompts to tell in perplexity" in ended.out, ended
    measured = Path("runs/eval-sparse-parity/measured.json")
    record = json.loads(measured.read_text())
    assert record["ended"] and record["measured"]
    record["ended"] = False
    measured.write_text(json.dumps(record))
    ended = run(*command, *sizes, "--context", "120")
    assert ended.status == 2 and "add --resume to go on with it" in ended.err
    ended = run(*command, *sizes, "--context", "140", "--resume")
    assert ended.status == 2 and "--resume: context differ from those of" in ended.err
    os.utime(home / "sparse" / "config.json")  # as a training that is repeated in the same folder writes it
    ended = run(*command, *sizes, "--context", "120", "--resume")
    assert ended.status == 2 and "--resume: model differ from those of" in ended.err
    record["asked"]["model"][1] = json.loads(json.dumps(written(home / "sparse")))
    measured.write_text(json.dumps(record))
    ended = run(*command, *sizes, "--context", "120", "--resume")
    assert ended.status == 0 and json.loads(measured.read_text()) == record | {"ended": True}
    ended = run("report", "runs/eval-sparse-parity", "--out", "page")
    assert ended.status == 0 and ended.out.strip() == "page/report.html"
    page = Path("page/report.html").read_text()
    assert "Parity with dense attention" in page and "<dt>command</dt>" in page
    assert Path("page/plots/runs-eval-sparse-parity-recall.csv").is_file()


def test_a_tokenizer_without_deepseeks_markers(run, home: Path, tmp_path: Path, monkeypatch) -> None:
    """Plain text works from sparsify to generate; sparsify says what does not, before warm-up would."""
    monkeypatch.chdir(tmp_path)
    dense = tokensieve.load(home / "dense")
    dense.folder = None
    tokensieve.save(dense, "dense")
    ended = run("sparsify", "dense", "bare", *commands.SMALL)
    assert ended.status == 0 and "training and generate need a tokenizer here: bare: no tokenizer.json" in ended.err
    plain = Tokenizer(BPE(unk_token="[UNK]"))
    trainer = BpeTrainer(vocab_size=300, special_tokens=["[UNK]", "[EOS]"])
    plain.train_from_iterator([(home / "text" / "ast.py").read_text()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", eos_token="[EOS]").save_pretrained("dense")

    ended = run("sparsify", "dense", "untrained", *commands.SMALL)
    assert ended.status == 0 and "plain text works, chat data and --chat do not: the tokenizer has no chat" in ended.err
    ended = run(*tiny(home, "warmup", Path("w"), "--model", "untrained", "--set", "phases.0.steps=1"))
    assert ended.status == 0, ended.err
    assert run("generate", "w/step-000001", "--prompt", "import ast", "--max-new-tokens", "2").status == 0
    commands.refusal(run)(("no chat template",), "generate", "w/step-000001", "--chat", "Hello")


def test_pretrain_makes_a_model(run, home: Path, tmp_path: Path) -> None:
    ended = run(*tiny(home, "pretrain", tmp_path / "p"))
    assert ended.status == 0 and tokensieve.load(tmp_path / "p" / "step-000003").config.model_type == "deepseek_v3"
    assert (tmp_path / "p" / "step-000003" / "tokenizer.json").is_file()


def test_generate_writes_to_standard_output(run, home: Path) -> None:
    new = ("--max-new-tokens", "5")
    dense = run("generate", home / "dense", "--prompt", "def parse(", *new)
    assert dense.status == 0 and dense.out.strip()
    assert run("generate", home / "sparse", "--prompt", "def parse(", "--selection", "dense", *new).out == dense.out
    chat = run("generate", home / "sparse", "--chat", "Hello", "--selection", "window", *new)
    assert chat.status == 0 and chat.out != dense.out
    drawn = [
        run("generate", home / "dense", "--prompt", "x", "--temperature", 2, "--seed", s, *new).out for s in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


# a process of its own


@pytest.mark.slow
def test_as_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tokensieve", "generate", "nowhere", "--prompt", "x"], capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("tokensieve: error: model 'nowhere': no such folder") and done.stderr.count("\n") == 1
