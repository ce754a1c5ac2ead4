"""A conversion holds about one shard and not the model: peak resident memory of a process that does nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import INDEXER, SMALL, random_tensors, write_folder
from tokensieve.families import SparseConfig

RANKS = 8
SHAPE = {"hidden_size": 512, "vocab_size": 2048, "intermediate_size": 1024, "moe_intermediate_size": 512}
SHAPE |= {"num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 8, "n_routed_experts": 8}

# A small conversion first loads what is loaded late. Pages of files count as the process's own while they are mapped,
# so a conversion that keeps its input open fails here even if it copies nothing. Not getrusage: its peak outlives exec,
# and so begins at that of the process that started this one.
PROGRAM = """
import json, re, sys
from tokensieve import checkpoint

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def there_and_back(folder, ranks, shard_bytes):
    checkpoint.write_shards(folder, folder + "-shards", ranks)
    written = peak()
    checkpoint.join_shards(folder + "-shards", folder + "-back", shard_bytes=shard_bytes)
    return written, peak()

before = there_and_back(sys.argv[1], 2, 10_000)[1]
print(json.dumps([after - before for after in there_and_back(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_memory(tmp_path: Path) -> None:
    for name, shape in (("small", SMALL), ("large", SMALL | SHAPE)):
        config = SparseConfig(**shape, **INDEXER)
        write_folder(tmp_path / name, config, random_tensors(config))
    model = (tmp_path / "large" / "model.safetensors").stat().st_size
    shard = model // RANKS
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "small"), str(tmp_path / "large"), str(RANKS), str(shard)]
    grown = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert model > 150e6 and len(list((tmp_path / "large-back").glob("model-*.safetensors"))) >= RANKS
    assert 0.5 * shard < grown[0] <= grown[1] < 3 * shard
