"""The script for SLURM, with stand-ins for SLURM's programs: what it starts on each machine."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "integrations" / "slurm" / "train.sbatch"
JOB = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "gpu[07-10]", "SLURM_JOB_NUM_NODES": "4"}
JOB |= {"SLURM_CPUS_PER_TASK": "64"}


def started(tmp_path: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    programs = {"srun": 'printf "%s\\n" "$@"', "scontrol": 'test "$3" = "gpu[07-10]" && printf "gpu07\\ngpu08\\n"'}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return subprocess.run(["bash", SCRIPT, *arguments], env=path | JOB | more, capture_output=True, text=True)


def test_one_torchrun_a_machine(tmp_path: Path) -> None:
    ended = started(tmp_path, "adapt", "--config", "a file.toml", SLURM_GPUS_ON_NODE="4")
    assert ended.returncode == 0, ended.stderr
    words = ended.stdout.splitlines()
    assert words[:3] == ["--kill-on-bad-exit=1", "--cpus-per-task=64", "torchrun"]
    options = dict(zip(words[3:13:2], words[4:13:2], strict=True))
    assert options["--nnodes"] == "4" and options["--nproc-per-node"] == "4"
    assert options["--rdzv-endpoint"] == f"gpu07:{20000 + 123456 % 20000}" and options["--rdzv-id"] == "123456"
    assert words[13:] == ["-m", "tokensieve", "adapt", "--config", "a file.toml"]


def test_a_job_without_a_command(tmp_path: Path) -> None:
    ended = started(tmp_path)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1 and "name a stage" in ended.stderr


def test_the_log_is_where_slurm_can_write_it() -> None:
    """SLURM makes no folders: a job whose log is in one that is missing ends without a word."""
    (output,) = (line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH --output"))
    assert output == "#SBATCH --output=slurm-%j.log"
