"""`tokensieve deploy`: exact commands, the memory that they take, the compose file, and starting an engine."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config

from tests.support import commands
from tests.support.deployments import FP8, LINEAR, config, edit, make, make_home, no_tokenizer, reasons
from tokensieve import checkpoint, cli, cost
from tokensieve.config import UserError
from tokensieve.deploy import Deployment, plan, planning
from tokensieve.deploy.command import become
from tokensieve.deploy.compose import compose_file, write_compose
from tokensieve.deploy.hardware import HARDWARE
from tokensieve.families import SparseConfig
from tokensieve.model import model_path


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return make_home(tmp_path_factory.mktemp("deploy"))


# what is served, and the commands


def test_commands(home: Path) -> None:
    def line(engine: str, name: str, **options: Any) -> str:
        return plan(engine, str(home / name), **options).line().replace(str(home), "")

    dp8 = "--tp 8 --dp 8 --enable-dp-attention"
    sglang = "python -m sglang.launch_server --model"
    assert line("vllm", "sparse") == "vllm serve /sparse --tensor-parallel-size 8"
    assert line("vllm", "dense", gpus=2) == "vllm serve /dense --tensor-parallel-size 2"
    assert line("vllm", "fp8", gpus=2) == "vllm serve /fp8 --tensor-parallel-size 2"
    assert line("vllm", "sparse", context=1024, options=("--port", "9")) == (
        "vllm serve /sparse --tensor-parallel-size 8 --max-model-len 1024 --port 9"
    )
    assert line("sglang", "sparse") == f"{sglang} /sparse {dp8}"
    assert line("sglang", "dense") == f"{sglang} /dense {dp8}"
    assert line("sglang", "sparse", gpus=1, context=64) == f"{sglang} /sparse --tp 1 --context-length 64"
    for name in ("mi300", "mi350"):
        assert line("sglang", "sparse", hardware=name) == (
            f"{sglang} /sparse --tp 8 --nsa-prefill-backend tilelang --nsa-decode-backend tilelang"
        )
    assert line("sglang", "sparse", hardware="b200") == f"{sglang} /sparse {dp8}"
    assert line("vllm", "sparse", hardware="b200") == "vllm serve /sparse --tensor-parallel-size 8"
    assert line("sglang", "dense", hardware="mi350") == f"{sglang} /dense --tp 8"
    npu = "--attention-backend ascend --mem-fraction-static 0.85 --chunked-prefill-size 32768 --disable-radix-cache"
    assert line("sglang", "sparse", hardware="npu-a2") == f"{sglang} /sparse --tp 8 {npu}"
    assert line("sglang", "sparse", hardware="npu-a3", gpus=8) == f"{sglang} /sparse --tp 8 {npu}"


def test_what_else_is_served(home: Path, tmp_path: Path) -> None:
    """Another k for vLLM, stored float32, DeepSeek-V2, and dense models of other widths, such as the bundled base."""
    folder = shutil.copytree(home / "sparse", tmp_path / "k")
    edit(index_topk=1024)(folder)
    assert plan("vllm", str(folder)).context == 4096
    floats = make(tmp_path / "float32", config(), torch.float32)
    assert plan("vllm", str(floats)).line().endswith("--tensor-parallel-size 8 --dtype bfloat16")
    assert plan("vllm", str(floats)).weights == pytest.approx(plan("vllm", str(home / "sparse")).weights)
    v2 = make(tmp_path / "v2", config(DeepseekV2Config))
    assert plan("vllm", str(v2)) and plan("sglang", str(v2))
    assert plan("vllm", "base").line().endswith("--tensor-parallel-size 8")
    assert plan("sglang", "base").line().endswith("--enable-dp-attention --attention-backend triton")


def test_scores_in_fp8_are_pointed_out(home: Path, caplog) -> None:
    with caplog.at_level("WARNING", "tokensieve"):
        plan("vllm", str(home / "sparse"))
    assert [r.getMessage() for r in caplog.records if "index_dtype" in r.getMessage()]


# memory, at the size of the published model


@pytest.fixture
def published(tmp_path: Path, monkeypatch) -> Callable[[str], Path]:
    """The folder of a checkpoint of 671B parameters that has only its tensors' headers."""

    def headers(dtype: str) -> Path:
        folder, full = tmp_path / dtype, SparseConfig(max_position_embeddings=163840)
        folder.mkdir()
        raw = checkpoint.export_config(full.to_dict(), torch.bfloat16, mtp=False)
        (folder / "config.json").write_text(
            json.dumps(raw | ({"quantization_config": FP8} if dtype == "F8_E4M3" else {}))
        )
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(model_path("base") / name, folder)
        found = {}
        for name, shape in checkpoint.expected_tensors(full).items():
            linear = name.removesuffix(".weight").endswith(tuple(f".{x}" for x in LINEAR))
            file = folder / "model-00001-of-00163.safetensors"
            found[name] = checkpoint.Header(file, shape, dtype if linear else "BF16")
        mtp = checkpoint.Header(folder / "model-00163-of-00163.safetensors", (10**6, 10**6), "BF16")
        monkeypatch.setattr(planning, "tensor_headers", lambda *_: found | {"model.layers.61.eh_proj.weight": mtp})
        return folder

    return headers


def test_memory(published) -> None:
    shape = cost.shape_of(SparseConfig())
    folder = str(published("F8_E4M3"))
    tensors, requests = plan("vllm", folder), plan("sglang", folder)
    total = cost.parameters(shape).total
    assert 1.00 < tensors.weights / (total / 8) < 1.06  # what every device repeats is little
    heads = 61 * (128 * (192 * 1536 + 256 * 512 + 128 * 7168))
    embedding = 2 * 129280 * 7168
    assert requests.weights - tensors.weights == pytest.approx((heads + embedding) * 7 / 8)
    assert tensors.cache == 61 * 163840 * (656 + 132) and requests.cache == 61 * 163840 * (1152 + 132)
    assert requests.estimate().startswith("110 GB on each of 8 H200 of 141 GB: 96.8 GB of weights, 12.8 GB of cache"), (
        requests.estimate()
    )
    assert "too large" in reasons("sglang", Path(folder), gpus=4)[-1]
    whole = published("BF16")
    assert len(reasons("sglang", whole)) == 1 and "more --gpus" in reasons("vllm", whole)[0]
    assert plan("sglang", str(whole), hardware="mi350").weights == pytest.approx(total * 2 / 8, rel=0.06)
    assert "too large" in reasons("sglang", whole, hardware="npu-a3", gpus=16)[0]


# the compose file


def test_compose(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home / "sparse", tmp_path / "a $price: mine")
    found = plan("sglang", str(folder), options=("--reasoning-parser", "deepseek_v3"))
    file = tmp_path / "new" / "compose.yaml"
    write_compose(found, file)
    mount = {"type": "bind", "source": str(folder), "target": "/model", "read_only": True}
    service = {
        "image": "lmsysorg/sglang:latest",
        "entrypoint": (
            "python -m sglang.launch_server --model /model --host 0.0.0.0 --port 30000 "
            "--tp 8 --dp 8 --enable-dp-attention --reasoning-parser deepseek_v3"
        ).split(),
        "ipc": "host",
        "ports": ["127.0.0.1:30000:30000"],
        "deploy": {
            "resources": {"reservations": {"devices": [{"driver": "nvidia", "count": 8, "capabilities": ["gpu"]}]}}
        },
        "volumes": [mount],
    }
    assert compose_file(found) == {"services": {"sglang": service}}
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["services"]["sglang"]["volumes"][0]["source"] == str(folder).replace("$", "$$")
    yaml = pytest.importorskip("yaml", reason="a YAML parser comes with transformers")
    assert yaml.safe_load(file.read_text(encoding="utf-8")) == written
    with pytest.raises(UserError, match="exists already"):
        write_compose(found, file)


def test_compose_of_other_hardware(home: Path) -> None:
    def service(engine: str, **options: Any) -> dict[str, Any]:
        return compose_file(plan(engine, str(home / "sparse"), **options))["services"][engine]

    vllm = service("vllm", gpus=4)
    assert vllm["image"].startswith("vllm/vllm-openai:") and vllm["ports"] == ["127.0.0.1:8000:8000"]
    assert vllm["entrypoint"] == "vllm serve /model --tensor-parallel-size 4".split()
    assert vllm["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 4
    amd = service("sglang", hardware="mi350")
    assert amd["image"] == "lmsysorg/sglang:v0.5.8-rocm700-mi35x" and "environment" not in amd
    assert amd["devices"] == ["/dev/kfd:/dev/kfd", "/dev/dri:/dev/dri"] and "deploy" not in amd
    for name, image in (("npu-a2", "lmsysorg/sglang:dsv32-a2"), ("npu-a3", "lmsysorg/sglang:dsv32-a3")):
        npu = service("sglang", hardware=name, gpus=4)
        assert npu["image"] == image and npu["network_mode"] == "host" and "ports" not in npu
        assert [d.split(":")[0] for d in npu["devices"]] == [
            *(f"/dev/davinci{i}" for i in range(4)),
            "/dev/davinci_manager",
            "/dev/hisi_hdc",
        ]
        assert "/usr/local/Ascend/driver" in [volume["target"] for volume in npu["volumes"]]
        assert "--host" not in npu["entrypoint"]  # it shares the host's network, and listens on the loopback only


def test_links_are_not_mounted(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for path in (home / "sparse").iterdir():
        (folder / path.name).symlink_to(path)
    found = plan("vllm", str(folder))  # as in a hub's cache; fine without a container
    with pytest.raises(UserError, match="links"):
        write_compose(found, tmp_path / "compose.yaml")


# the command line


def test_the_command_offers_what_is_known() -> None:
    assert [str(engine) for engine in cli.serving.Engine] == list(planning.LABELS)
    assert [str(hardware) for hardware in cli.serving.Hardware] == list(HARDWARE)


def test_printed(run, home: Path, tmp_path: Path) -> None:
    ended = run(
        "deploy", "sglang", home / "sparse", "--compose", tmp_path / "c.yaml", "--gpus", "8", "--", "--port", "9"
    )
    assert ended.status == 0 and (tmp_path / "c.yaml").is_file()
    command = f"python -m sglang.launch_server --model {home / 'sparse'} --tp 8 --dp 8 --enable-dp-attention --port 9"
    assert ended.out == command + "\n"
    assert "on each of 8 H200 of 141 GB" in " ".join(ended.err.split())


def test_a_line_a_reason(run, home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home / "sparse", tmp_path / "model")
    no_tokenizer(folder)
    edit(index_topk=512)(folder)
    ended = run("deploy", "sglang", folder)
    assert ended.status == 2 and not ended.out
    lines = ended.err.splitlines()
    assert len(lines) == 2 and all(line.startswith("tokensieve: error: ") for line in lines)
    commands.refusal(run)(("tokenizer.json",), "deploy", "vllm", folder)
    commands.refusal(run)(("'nowhere'", "no such folder"), "deploy", "vllm", "nowhere")
    for bad in (("tgi", folder), ("vllm", folder, "--gpus", "0"), ("vllm", folder, "--hardware", "tpu"), ("vllm",)):
        ended = run("deploy", *bad)
        assert ended.status == 2 and "Usage" in ended.err


def test_the_program_is_missing(run, home: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for engine, program in (("vllm", "vllm"), ("sglang", "python")):
        commands.refusal(run)((f"{program} is not on PATH", "install"), "deploy", engine, home / "sparse", "--run")


def test_it_becomes_the_program(home: Path, monkeypatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(os, "execvp", lambda *arguments: asked.extend(arguments))
    found: Deployment = plan("sglang", str(home / "sparse"), hardware="mi350")
    become(found)
    assert asked == ["python", found.command()]


def test_deepseek_v32_as_published_has_no_chat_template(home: Path, tmp_path: Path) -> None:
    """vLLM is told to use its own encoder, SGLang finds it by itself; the parsers are a hint, not passed."""
    folder = shutil.copytree(home / "sparse", tmp_path / "model")
    edit("tokenizer_config.json", chat_template=...)(folder)
    vllm, sglang = plan("vllm", str(folder)), plan("sglang", str(folder))
    assert vllm.line().endswith("--tensor-parallel-size 8 --tokenizer-mode deepseek_v32")
    assert sglang.line() == plan("sglang", str(home / "sparse")).line().replace(str(home / "sparse"), str(folder))
    assert vllm.parsers[-3:] == ("--tool-call-parser", "deepseek_v32", "--enable-auto-tool-choice")
    assert "deepseekv32" in sglang.parsers
    assert plan("vllm", str(home / "sparse")).parsers == ()  # with a template of its own, nobody knows its notation


@pytest.mark.slow
def test_it_becomes_the_engine(home: Path, tmp_path: Path) -> None:
    """As a process, with a `vllm` on PATH that records its arguments and exits with status 7."""
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/asked\nexit 7\n')
    fake.chmod(0o755)
    environment = os.environ | {"PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}"}
    command = ("deploy", "vllm", home / "dense", "--gpus", "1", "--run", "--", "--port", "9")
    done = subprocess.run(
        [sys.executable, "-m", "tokensieve", *map(str, command)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 7 and not done.stdout, done
    asked = (tmp_path / "asked").read_text().split()
    assert asked == ["serve", str(home / "dense"), "--tensor-parallel-size", "1", "--port", "9"]
