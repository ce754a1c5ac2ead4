"""Context parallelism: how evenly ranks share a sequence, and what they send, beside the least that they could.

    python benchmarks/context_parallel.py [--tokens 131072] [--top-k 2048]
    torchrun --nproc-per-node 4 benchmarks/context_parallel.py

The first command counts the keys that each rank's queries see, and those that they select: the rank with the most
keys, divided by the mean over ranks. Layouts: chunks of 128 tokens that are dealt to the ranks in turn and back (ours),
2R long chunks of which rank r has the chunks r and 2R - 1 - r ("zigzag"), and R stretches of a row. Packs are one
document, or documents whose lengths are drawn from a log-normal distribution (median 2048 tokens, sigma 1.5): of 32
such packs the worst, and the mean.

A second table sets tensor parallelism beside it: bytes that a rank receives, times R / (R - 1), in bfloat16. Tensor
parallelism sums a layer's hidden states of all tokens twice in the forward and twice in the backward pass, each sum by
a ring. The target of the indexers' loss is a sum over heads, and so over its ranks: of k numbers a query in adaptation,
of all keys that it sees in warm-up, float32. "layer": FSDP's part in a micro-batch that tensor parallelism would spare,
a layer's weights twice and its gradients once, without routed experts. "below": the tokens of a micro-batch up to which
tensor parallelism exchanges less than FSDP with context parallelism.

The second command runs one step of both stages of a small model, and adds up the bytes that a rank receives in a layer.
"counted": (R - 1) / R of what all tokens leave behind, once forward and, if the trunk learns, once backward. "least":
tokens of other ranks that some query of this rank sees, in the mean over ranks. Tables to standard output.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tokensieve import cost
from tokensieve.config import PhaseConfig, TrainConfig
from tokensieve.cost.paper import published_shape
from tokensieve.cost.train_memory import layer_parameters
from tokensieve.cost.train_rates import GROUPED, LITE
from tokensieve.families import model_config
from tokensieve.mesh import Mesh, join_mesh
from tokensieve.model import DecoderForCausalLM, ForwardOptions, gathered
from tokensieve.model.gathered import CHUNK, ContextGroup
from tokensieve.model.pack import Pack, make_pack
from tokensieve.train.learning import learning
from tokensieve.train.loop import STAGES
from tokensieve.train.parallelize import divide, shard
from tokensieve.train.stage import StepTotals, backward, options_of

RANKS = (2, 4, 8, 16)
# By which FSDP gathers and scatters: the names of torch 2.13, and those from before.
FSDP_CALLS = ("all_gather_single", "reduce_scatter_single", "all_gather_into_tensor", "reduce_scatter_tensor")
PACKS = 32  # drawn packs
MEDIAN, SIGMA = 2048, 1.5  # tokens of a document
SMALL = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"head_dim": 64, "intermediate_size": 256, "vocab_size": 512, "max_position_embeddings": 1 << 20}
SMALL |= {"index_topk": 64, "index_n_heads": 4, "index_head_dim": 64, "index_rope_head_dim": 32}


def documents(tokens: int, seed: int) -> Tensor:
    """Positions (1, tokens) of a pack of drawn documents."""
    draw = torch.Generator().manual_seed(seed)
    positions = torch.arange(tokens)
    begin = 0
    while begin < tokens:
        positions[begin:] = torch.arange(tokens - begin)
        begin += max(1, int(MEDIAN * torch.exp(SIGMA * torch.randn((), generator=draw))))
    return positions[None]


def pack_of(positions: Tensor) -> Pack:
    tokens = positions.shape[1]
    return make_pack(1, tokens, torch.device("cpu"), positions, None, None, tokens)


def busiest(keys_T: Tensor, ranks: int, chunk: int | None) -> float:
    """The most keys of a rank, divided by the mean. chunk: of our layout; None: one stretch for each rank."""
    if chunk is None:
        sums = keys_T.view(ranks, -1).sum(1)
    else:
        sums = torch.stack([ContextGroup(r, ranks, None, chunk).own(keys_T[None]).sum() for r in range(ranks)])
    return float(sums.max() / sums.double().mean())


def balance(tokens: int, top_k: int) -> Table:
    layouts = ("ours", CHUNK), ("zigzag", tokens), ("stretches", None)
    table = Table("pack", "ranks", *(f"{what}: {name}" for what in ("seen", "selected") for name, _ in layouts))
    for name, packs in (
        ("one document", [pack_of(torch.arange(tokens)[None])]),
        ("documents", [pack_of(documents(tokens, seed)) for seed in range(PACKS)]),
    ):
        seen = [pack.ends_N.long() - pack.starts_N for pack in packs]
        for ranks in RANKS:
            cells = []
            for limit in (tokens, top_k):
                for _, chunk in layouts:
                    found = [busiest(keys.clamp(max=limit), ranks, chunk) for keys in seen]
                    mean = sum(found) / len(found)
                    cells.append(f"{mean:.2f}" if len(found) == 1 else f"{max(found):.2f}, {mean:.2f}")
            table.add_row(name, str(ranks), *cells)
    return table


def shapes() -> dict[str, cost.Shape]:
    """Of the stacks of many_gpus.py."""
    return {
        "DeepSeek-V3.2": published_shape(),
        "V2-Lite": cost.shape_of(LITE),
        "32 heads over 8 groups": cost.shape_of(GROUPED),
    }


def beside_tensor_parallel(tokens: int) -> Table:
    table = Table("shape", "a token and layer: context", "tensor", "its target, adapt", "warm-up", "layer, MB", "below")
    for name, shape in shapes().items():
        context = bytes_a_token("adapt", 2 * shape.attention.cached, 2 * shape.index_dim)
        tensor = 4 * 2 * 2 * shape.hidden  # sums, ways of a ring, bytes
        targets = (2 * 4 * min(shape.top_k, tokens), 2 * 4 * (tokens + 1) // 2)
        layer = 3 * 2 * max(kind.other for kind in layer_parameters(shape))
        below = layer / (tensor + targets[0] - context)
        cells = (context, tensor, *targets, layer / 1e6, below)
        table.add_row(name, *(f"{cell:,.0f}" for cell in cells))
    return table


def least(pack: Pack, ranks: int) -> float:
    """Tokens of other ranks that a rank's queries see, in the mean over ranks."""
    tokens, total = torch.arange(pack.length)[None], 0
    for rank in range(ranks):
        group = ContextGroup(rank, ranks, None)
        edges = torch.zeros(pack.length + 1, dtype=torch.long)
        own = group.own_queries(pack)
        edges.index_add_(0, own.starts_N.long(), torch.ones(len(own.starts_N), dtype=torch.long))
        edges.index_add_(0, own.ends_N.long(), -torch.ones(len(own.ends_N), dtype=torch.long))
        seen = edges.cumsum(0)[:-1] > 0
        seen[group.own(tokens)[0]] = False
        total += int(seen.sum())
    return total / ranks


class Received(NamedTuple):
    """Bytes that a rank receives from others in one collective. what: "context" or "parameters", FSDP's gradients too.

    Of a sum over ranks they are those of a ring.
    """

    what: str
    bytes: int


@contextmanager
def counting() -> Iterator[list[Received]]:
    """What this rank receives by each collective of context parallelism and FSDP within the block, in their order."""
    received: list[Received] = []

    def counted(what: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            out, x = (tensor for tensor in (*args, *options.values()) if isinstance(tensor, Tensor))
            received.append(Received(what, abs(out.nbytes - x.nbytes)))
            return collective(*args, **options)

        return call

    with ExitStack() as patched:
        for name in ("all_gather", "reduce_scatter"):
            patched.enter_context(patch.object(gathered, name, counted("context", getattr(gathered, name))))
        for name in FSDP_CALLS:
            if hasattr(dist, name):
                patched.enter_context(patch.object(dist, name, counted("parameters", getattr(dist, name))))
        yield received


def bytes_a_token(stage: str, entry: int, index: int) -> int:
    """What ranks must exchange of each token in a layer and a step: its entry and index key, and their gradients.

    A warm-up has no gradient of entries, and the dense model (stage "pretrain") no index keys. entry, index: bytes.
    """
    return {"warmup": entry + 2 * index, "adapt": 2 * (entry + index), "pretrain": 2 * entry}[stage]


def sent(mesh: Mesh, tokens: int) -> Table:
    table = Table("pack", "stage", "KiB of a layer", "counted", "least")
    R, layers = mesh.size, SMALL["num_hidden_layers"]
    entry, index = 2 * SMALL["num_key_value_heads"] * SMALL["head_dim"] * 4, SMALL["index_head_dim"] * 4  # bytes
    for name, positions in (("one document", torch.arange(tokens)[None]), ("documents", documents(tokens, 3))):
        batch = {"input_ids": positions % SMALL["vocab_size"], "labels": positions % SMALL["vocab_size"]}
        batch["position_ids"] = positions
        for stage in ("warmup", "adapt"):
            run = TrainConfig(stage, "", "", (PhaseConfig(1, tokens, 1),), device="cpu", context_parallel=R)
            torch.manual_seed(0)
            model = DecoderForCausalLM(model_config({"model_type": "qwen3_dsa"} | SMALL)).train()
            division = divide(run, mesh)
            with learning(model, STAGES[stage].learners(run)), counting() as received:
                root = shard(model, division)
                options = options_of(STAGES[stage], run).over(ForwardOptions(context=division.context))
                backward(STAGES[stage], root, batch, StepTotals(tokens, tokens), options, mesh.device)
            each = bytes_a_token(stage, entry, index)
            found = sum(one.bytes for one in received if one.what == "context")
            cells = (found / layers, tokens * (R - 1) / R * each, least(pack_of(positions), R) * each)
            table.add_row(name, stage, *(f"{cell / 1024:.1f}" for cell in cells))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="of a row; 131072, and on several ranks 8192")
    parser.add_argument("--top-k", type=int, default=2048)
    options = parser.parse_args()
    with join_mesh("cpu") as mesh:
        if mesh.size > 1:
            tables = [sent(mesh, options.tokens or 8192)]
        else:
            tokens = options.tokens or 131072
            tables = [balance(tokens, options.top_k), beside_tensor_parallel(tokens)]
        if mesh.leads:
            Console(width=120).print(*tables)


if __name__ == "__main__":
    main()
