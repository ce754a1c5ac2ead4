"""No op holds anything of size heads x S x T, forward or backward: peak resident memory of a process that does
nothing else."""

import json
import subprocess
import sys

import pytest

S, T, H = 1024, 4096, 16
HEADS_S_T = H * S * T * 4  # 256 MiB in float32

# The peak only ever grows, so each op is charged with what it adds to the peak of those before it: one process, one
# import. A first round at small sizes loads what PyTorch loads late.
PROGRAM = """
import json, resource, sys, torch
from tokensieve import ops

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def peaks(S, T, H):
    g = torch.Generator().manual_seed(0)
    starts, ends = torch.zeros(S, dtype=torch.int32), torch.arange(T - S + 1, T + 1, dtype=torch.int32)
    shapes = (S, H, 16), (T, 1, 16), (S, H, 8), (T, 8), (S, H)
    q, kv, *index = (torch.randn(shape, generator=g).requires_grad_() for shape in shapes)
    before = peak()
    indices = ops.index_topk(*(x.detach() for x in index), 64, starts, ends)
    selected = peak()
    ops.index_topk_blocks(*(x.detach() for x in index), 64, starts, ends, block=32, blocks=32)
    searched = peak()
    out, lse, kl = ops.sparse_attention_kl(q, kv, indices, 0.25, 16, 0, 16, *index)
    (out.sum() + kl.sum()).backward()
    sparse = peak()
    out, lse = ops.dense_attention(q, kv, kv, starts, ends, 0.25)
    out.sum().backward()
    dense = peak()
    ops.indexer_kl_dense(q, kv, lse, 0.25, *index, starts, ends).sum().backward()
    warmup = peak()
    return dict(
        select=selected - before, blocks=searched - selected, sparse=sparse - searched, dense=dense - sparse,
        warmup=warmup - dense,
    )

peaks(8, 128, 2)
print(json.dumps(peaks(*map(int, sys.argv[1:]))))
"""


@pytest.mark.slow
def test_peak_memory() -> None:
    """Not even a quarter of heads x S x T, all temporaries together (they are blocks of a fixed size, a few MiB
    each)."""
    command = [sys.executable, "-c", PROGRAM, str(S), str(T), str(H)]
    growth = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert growth.keys() == {"select", "blocks", "sparse", "dense", "warmup"}
    for what, added in growth.items():
        assert added < HEADS_S_T / 4, f"{what} added {added / 2**20:.0f} MiB"
