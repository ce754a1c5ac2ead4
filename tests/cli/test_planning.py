"""`tokensieve plan`: its table and plan.json, the command that it gives, and one line for what cannot be."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from typer.main import get_command

from tests.support.commands import Ended, Run, refusal, runner
from tokensieve import cli
from tokensieve.config import TrainConfig, load_config
from tokensieve.cost.gpus import GPUS
from tokensieve.model import model_path

MODELS = ("moonlight-16b-a3b", "deepseek-v2-lite", "qwen3-8b")
PHASE = "[[phases]]\nsteps = 10\ncontext = 1024\nsequences = 8\n"
PAPER = ("plan", "paper_warmup", "paper_adapt", "--model", "deepseek_v32", "--gpus", 1024, "--gpu", "H800")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    monkeypatch.chdir(tmp_path)
    return runner(capsys)


def commands_of(ended: Ended) -> list[str]:
    """The commands that a plan prints, each read by the options of its own subcommand."""
    assert ended.status == 0, ended
    found = [line.strip() for line in ended.out.splitlines() if line.startswith(("  tokensieve ", "  torchrun "))]
    for command in found:
        name, *arguments = shlex.split(command.partition("tokensieve ")[2])
        get_command(cli.app).commands[name].make_context(name, arguments)  # raises for an unknown option
    return found


@pytest.mark.parametrize("model", MODELS)
def test_published_shapes_have_plans_and_configs(run: Run, model: str) -> None:
    """On eight GPUs of 80 GB, without weights: both stages fit, with the commands that run them in their order."""
    ended = run("plan", f"{model}-warmup", f"{model}-adapt", "--model", model, "--gpu", "h100", "--out", "out")
    assert ended.status == 0, ended
    found = json.loads(Path("out/plan.json").read_text())
    warmup, adapt = found["stages"]
    assert [stage["stage"] for stage in found["stages"]] == ["warmup", "adapt"]
    assert warmup["memory_bytes"] < warmup["usable_bytes"] == 0.9 * GPUS["h100"].memory
    heads = 16 if model == "qwen3-8b" else 8
    sparsify, train = warmup["commands"]
    assert sparsify.startswith(f"tokensieve sparsify FOLDER runs/untrained --top-k 2048 --index-heads {heads} ")
    torchrun = "torchrun --nproc-per-node 8 -m tokensieve"
    assert train == f"{torchrun} warmup --config {model}-warmup --model runs/untrained"
    config = load_config(TrainConfig, f"{model}-warmup")
    last = f"{config.out}/step-{config.phases[0].steps:06d}"
    assert adapt["commands"] == [f"{torchrun} adapt --config {model}-adapt --model {last}"]
    assert all(command in ended.out for command in (sparsify, train, *adapt["commands"]))
    text = (Path(cli.__file__).parents[1] / "configs" / f"{model}-adapt.toml").read_text()
    assert last in text and " ".join(text.replace("#", "").replace("\\", "").split()).count(adapt["commands"][0]) == 1


def test_the_papers_schedule(run: Run) -> None:
    """2.1 and 943.7 billion tokens, and the GPU-hours of each stage; the experts are divided as the configs say."""
    ended = run(*PAPER, "--json")
    assert ended.status == 0, ended
    found = json.loads(ended.out)
    assert found == json.loads(Path("runs/plan/plan.json").read_text())
    warmup, adapt = found["stages"]
    assert (warmup["tokens"], adapt["tokens"]) == (1000 * 16 * 131072, 15000 * 480 * 131072)
    nodes = "torchrun --nnodes 128 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m tokensieve"
    assert warmup["commands"] == [f"{nodes} warmup --config paper_warmup --model FOLDER"]
    assert adapt["commands"] == [f"{nodes} adapt --config paper_adapt --model runs/paper-warmup/step-001000"]
    assert warmup["expert_parallel"] == adapt["expert_parallel"] == 32
    for stage in (warmup, adapt):
        (phase,) = stage["phases"]
        assert stage["gpu_hours"] == pytest.approx(phase["steps"] * phase["step_seconds"] * 1024 / 3600)
        assert stage["usd"] == pytest.approx(2 * stage["gpu_hours"])
        assert "extrapolated" in stage["label"] and "roofline" in stage["label"]
        assert {held["origin"] for held in phase["memory"]} == {"counted", "estimated"}
        (activations,) = (held["bytes"] for held in phase["memory"] if held["name"] == "activations")
        both = stage["activation_bytes"]
        assert activations == both["recomputed"] and both["kept"] >= both["recomputed"]
        assert sum(held["bytes"] for held in phase["memory"]) == stage["memory_bytes"]
    assert 0.5e3 < warmup["gpu_hours"] < 3e3 and 1e5 < adapt["gpu_hours"] < 1e6
    assert found["usd"] == pytest.approx(warmup["usd"] + adapt["usd"])
    shown = run(*PAPER)
    assert " ".join(shown.out.split()).count("; expert_parallel 32 ") == 2 and shown.out.count("torchrun") == 2


def test_shares_and_prices_that_are_given(run: Run) -> None:
    model = ("plan", "deepseek-v2-lite-adapt", "--model", "deepseek-v2-lite", "--json")
    plain, given = (json.loads(run(*model, *more).out) for more in ((), ("--rate", "products=0.5", "--price", "3")))
    assert given["usd_per_gpu_hour"] == 3 and given["usd"] == pytest.approx(3 * given["gpu_hours"])
    old, new = (found["stages"][0]["phases"][0]["parts"][0] for found in (plain, given))
    assert new["label"] == "given" and new["seconds"] == pytest.approx(new["flops"] / (0.5 * 989.5e12))
    assert old["label"] == "measured" and old["flops"] == new["flops"]


def test_a_folder_comes_before_a_name(run: Run) -> None:
    """A folder of the user's is not replaced by the published shape, or the file, of that name."""
    shutil.copytree(model_path("base"), "qwen3-8b")
    shutil.copytree(model_path("base"), "deepseek_v32")
    for name in ("qwen3-8b", "./qwen3-8b", "deepseek_v32"):
        sparsify, _ = commands_of(run("plan", "warmup", "--model", name, "--gpus", 1))
        assert sparsify.startswith(f"tokensieve sparsify {name} ") and "--index-heads 4 " in sparsify
    absolute = Path("x").absolute()
    shutil.copytree(model_path("base"), absolute)
    shape = Path(cli.__file__).parents[1] / "configs" / "qwen3-8b.json"
    shutil.copy(shape, f"{absolute}.json")
    sparsify, _ = commands_of(run("plan", "warmup", "--model", absolute, "--gpus", 1))
    assert sparsify.startswith(f"tokensieve sparsify {absolute} ") and "--index-heads 4 " in sparsify
    refused = refusal(run)
    for name in (f"{shape.with_suffix('')}", "../configs/qwen3-8b", "qwen3-8c"):
        refused((f"model '{name}'", "sparse", "qwen3-8b", "moonlight-16b-a3b"), "cost", name)


def test_a_model_of_your_own(run: Run) -> None:
    """A folder, a config.json, a new model of a [shape], and machines of eight."""
    ended = run("plan", "adapt", "--model", "sparse", "--gpus", 1)
    assert ended.status == 0 and "tokensieve adapt --config adapt --model sparse" in ended.out, ended
    ended = run("plan", "base", "--gpus", 1)
    assert (
        ended.status == 0 and ended.out.count("a step of") == 4 and "tokensieve pretrain --config base\n" in ended.out
    )
    assert commands_of(run("plan", "base-128k", "--gpus", 1)) == ["tokensieve pretrain --config base-128k"]
    raw = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    raw |= {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
    Path("config.json").write_text(json.dumps(raw | {"max_position_embeddings": 131072}))
    more = ("--set", "phases.0.sequences=16", "--set", "activation_checkpointing=true")
    ended = run("plan", "adapt", "--model", "config.json", "--gpus", 16, *more)
    assert ended.status == 0, ended
    (command,) = commands_of(ended)
    assert command.startswith(
        "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m"
    )
    assert command.endswith(f"adapt --config adapt --model WARMED_UP {' '.join(more)}")
    assert run("plan", "adapt", "--model", "base", "--selection", "x").status == 2
    dense = run("plan", "adapt", "--model", "base", "--gpus", 1, "--set", "selection=false")
    assert dense.status == 0 and "sparsify" not in dense.out


def test_pretraining_names_its_model_by_set(run: Run) -> None:
    """`pretrain` has no --model. What its config says itself is not said again."""
    plain = "tokensieve pretrain --config base-128k"
    assert commands_of(run("plan", "base-128k", "--gpus", 1, "--model", "base")) == [plain]
    Path("mine").mkdir()
    shutil.copy(model_path("base") / "config.json", "mine")
    (command,) = commands_of(run("plan", "base-128k", "--gpus", 1, "--model", "mine", "--set", "seed=2"))
    words = shlex.split(command.removeprefix(plain))
    assert words == ["--set", 'model="mine"', "--set", 'data.tokenizer="mine"', "--set", "seed=2"]
    (command,) = commands_of(run("plan", "base-128k", "--gpus", 1, "--model", "mine/config.json"))
    assert 'model="FOLDER"' in command


def test_a_chain_goes_on_with_what_the_stage_before_leaves(run: Run) -> None:
    """The road to 128K of docs/training.md: the positions that the first stage gives are there in the next ones."""
    road = ("base-128k", "warmup-128k", "adapt-128k")
    commands = commands_of(run("plan", *road, "--model", "base", "--gpus", 1, "--out", "out"))
    extended, warmed_up = "runs/base-128k/step-000220", "runs/warmup-128k/step-000110"
    stages = json.loads(Path("out/plan.json").read_text())["stages"]
    assert [stage["phases"][-1]["context"] for stage in stages] == [131072] * 3
    assert commands == commands_of(run("plan", *road, "--gpus", 1))
    assert commands == [command for stage in stages for command in stage["commands"]] and len(commands) == 4
    assert commands[0] == "tokensieve pretrain --config base-128k"
    assert commands[1].startswith(f"tokensieve sparsify {extended} runs/untrained --top-k 2048 ")
    assert commands[2] == "tokensieve warmup --config warmup-128k --model runs/untrained"
    assert commands[3] == f"tokensieve adapt --config adapt-128k --model {warmed_up}"
    dense = ("plan", "base-128k", "adapt", "--gpus", 1, "--set", "selection=false")
    assert commands_of(run(*dense))[1] == f"tokensieve adapt --config adapt --model {extended} --set selection=false"
    last = f"runs/base/step-{sum(phase.steps for phase in load_config(TrainConfig, 'base').phases):06d}"
    _, command = commands_of(run("plan", "base", "base-128k", "--gpus", 1))
    assert shlex.split(command)[4:] == ["--set", f'model="{last}"', "--set", f'data.tokenizer="{last}"']


def test_a_chain_that_cannot_be(run: Run) -> None:
    refused = refusal(run)
    one = ("--gpus", 1)
    refused(("base: it makes a new model", "first stage"), "plan", "base-128k", "base", *one)
    refused(("adapt-128k: it selects keys", "warm up in between"), "plan", "base-128k", "adapt-128k", *one)
    refused(("131072 is past the model's 32768 positions",), "plan", "warmup-128k", "--model", "base", *one)
    refused(("base: its shape has ", "max_position_embeddings"), "plan", "base", "--model", "base", *one)
    stages = ("warmup", "adapt", "--model", "base")
    refused(("--set out", "by itself"), "plan", *stages, *one, "--set", "out=runs/mine")
    refused(("adapt and adapt both write to runs/adapt",), "plan", "adapt", "adapt", "--model", "sparse", *one)
    refused(("--set model", "--model"), "plan", *stages, *one, "--set", "model=sparse")
    assert commands_of(run("plan", "warmup", "--model", "base", *one, "--set", "out=runs/mine"))
    both = ("qwen3-8b-warmup", "qwen3-8b-adapt", "--model", "qwen3-8b", "--gpu", "H100")
    refused(("fits: --set", "plan qwen3-8b-adapt by itself"), "plan", *both, "--set", "phases.0.micro_batch=8")


def test_adapters(run: Run) -> None:
    """They are counted, and their command takes them; a stage behind theirs begins with the merged model."""
    on = ("--model", "moonlight-16b-a3b", "--gpus", 2, "--gpu", "H100")
    assert run("plan", "moonlight-16b-a3b-adapt", *on).status == 2
    ended = run("plan", "moonlight-16b-a3b-adapt", *on, "--set", "lora.rank=16")
    (command,) = commands_of(ended)
    assert command.endswith("--set lora.rank=16") and "; LoRA of rank 16" in ended.out
    (stage,) = json.loads(Path("runs/plan/plan.json").read_text())["stages"]
    assert stage["adapters"]["rank"] == 16 and "extrapolated" in stage["label"]
    Path("first.toml").write_text('stage = "adapt"\nmodel = "sparse"\nout = "first"\n[lora]\n' + PHASE)
    Path("second.toml").write_text('stage = "adapt"\nmodel = ""\nout = "second"\n' + PHASE)
    assert "--model first/merged" in run("plan", "first.toml", "second.toml", "--gpus", 1).out


TOO_LARGE = [
    ("moonlight-16b-a3b-adapt", "moonlight-16b-a3b", ("--gpus", 8, "--set", "activation_checkpointing=false")),
    ("moonlight-16b-a3b-adapt", "moonlight-16b-a3b", ("--gpus", 2)),
    ("deepseek-v2-lite-adapt", "deepseek-v2-lite", ("--gpus", 8, "--set", "context_parallel=1")),
    ("qwen3-8b-adapt", "qwen3-8b", ("--gpus", 8, "--set", "phases.0.micro_batch=8")),
    ("paper_warmup", "deepseek_v32", ("--gpus", 1024, "--set", "expert_parallel=1")),
    ("paper_adapt", "deepseek_v32", ("--gpus", 1024, "--set", "expert_parallel=1")),
]


@pytest.mark.parametrize(("config", "model", "options"), TOO_LARGE)
def test_what_would_fit_fits(run: Run, config: str, model: str, options: tuple) -> None:
    """Each of the settings that a refusal names makes a plan."""
    arguments = ("plan", config, "--model", model, "--gpu", "H100", *options)
    ended = run(*arguments)
    assert ended.status == 2 and "Traceback" not in ended.err
    (line,) = [line for line in ended.err.splitlines() if "tokensieve: error: " in line]
    assert line.startswith(f"tokensieve: error: {config}: the plan does not fit: it takes ")
    ways = line.partition("what fits: ")[2].split("; or ")
    assert ways != [""]
    for way in ways:
        again = run(*arguments, *shlex.split(way))
        assert again.status == 0, (way, again)


def test_bad_input(run: Run, tmp_path: Path) -> None:
    refused = refusal(run)
    lite = ("plan", "deepseek-v2-lite-adapt", "--model", "deepseek-v2-lite")
    refused(("'nowhere'", "not a bundled one"), "plan", "nowhere")
    refused(("adapt names no model", "--model"), "plan", "adapt")
    refused(("model 'nowhere'",), "plan", "adapt", "--model", "nowhere")
    refused(("nothing is fetched",), "plan", "adapt", "--model", "owner/name")
    refused(("A100", "H800"), *lite, "--gpu", "A100")
    refused(("MI350", "CUDA"), *lite, "--gpu", "MI350")
    refused(("--gpus 0",), *lite, "--gpus", 0)
    refused(("--gpus 9", "machines of 8"), *lite, "--gpus", 9)
    refused(("2.0 is not a share",), *lite, "--rate", "attention=2")
    refused(("--rate memory=1", "products, attention, network"), *lite, "--rate", "memory=1")
    refused(("context_parallel is 8", "4 ranks"), *lite, "--gpus", 4)
    refused(("phases.context 262144", "163840 positions"), *lite, "--set", "phases.0.context=262144")
    of_experts = ("--set", 'lora.targets=["experts.down_proj"]')
    refused(("lora.targets names experts", "leave one"), *lite, *of_experts, "--set", "expert_parallel=8")
    refused(("lora.targets: 'nothing'",), *lite, "--set", 'lora.targets=["nothing"]')
    refused(("--set steps",), *lite, "--set", "steps")
    refused(("unknown key nothing",), *lite, "--set", "nothing=1")
    refused(("expert_parallel is 5", "8 ranks"), *lite, "--set", "expert_parallel=5")
    alone = ("--set", "context_parallel=1", "--gpus", 512)
    refused(("16 sequences", "--set context_parallel=32"), "plan", "paper_warmup", "--model", "deepseek_v32", *alone)
    Path("broken.toml").write_text('stage = "adapt"\nmodel = "base"\nout = ""\nphases = []\n')
    refused(("broken.toml", "no phases"), "plan", "broken.toml")
    assert not Path("runs").exists()
    assert run(*lite, "--price", -1).status == 2
    refused(("--price is infinite",), *lite, "--price", "inf")
