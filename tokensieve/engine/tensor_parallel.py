"""Inference of one model on several ranks: tensor and expert parallelism, applied from outside of the model.

A rank is a process with a device of its own, as torchrun starts it. It holds

- its slice of every tensor that `checkpoint.shard_axis` divides: the rows and columns of its heads and of its part of a
  feed-forward layer, and its rows of the vocabulary;
- its run of whole experts;
- a copy of the rest, the indexer included.

The residual stream is the same on all ranks. The ranks' contributions are summed before they are added to it, once
after the attention and once after the feed-forward layer, whose routed and shared experts each rank has summed before.

Every rank could select keys for all queries, but two ranks that round differently would attend to different keys. So
each selects for its share of the queries, and the ranks exchange the indices.

Legend: N tokens, D hidden width, H heads of this rank, V vocabulary, K selected keys, E experts of this rank.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tokensieve import checkpoint
from tokensieve.config import UserError
from tokensieve.families import model_config
from tokensieve.mesh import Mesh
from tokensieve.model import DecoderForCausalLM, fp8, load, model_path
from tokensieve.model.attention import Attention
from tokensieve.model.files import came_from, fill
from tokensieve.model.moe import ORDINARY_ROWS, Experts
from tokensieve.model.rope import Rows
from tokensieve.model.selection import HeadGroup
from tokensieve.model.transformer import DecoderLayer


class MeshHeads(HeadGroup):
    """The heads of one model, divided between the ranks of a mesh.

    The ranks select together, and a selector that reads all heads gets them from all ranks.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def select(self, queries: int, choose: Callable[[Rows], Tensor | None]) -> Tensor | None:
        """Indices for all queries, of which each rank chooses its share.

        None if `choose` returns None: attention is dense.
        """
        mesh = self.mesh
        # On a GPU bits depend on the batch anyway, so shares may have any size.
        grain = 1 if mesh.device.type == "cuda" else ORDINARY_ROWS
        size = min(-(-queries // (mesh.size * grain)) * grain, queries)
        # All shares have one size, so the last ones may overlap. Where they do, the earlier rank's indices are used.
        first = [min(rank * size, queries - size) for rank in range(mesh.size)]
        share = choose(slice(first[mesh.rank], first[mesh.rank] + size) if size < queries else None)
        if share is None:  # dense, and so on all ranks
            return None
        parts = mesh.all_gather(share)
        return torch.cat([part[rank * size - first[rank] :] for rank, part in enumerate(parts)])

    def all_heads(self, q_NHD: Tensor) -> Tensor:
        """Queries of all ranks' heads, (N, H * ranks, D)."""
        return torch.cat(self.mesh.all_gather(q_NHD), 1)


def load_rank(name: str | Path, mesh: Mesh, dtype: torch.dtype | None = None) -> DecoderForCausalLM:
    """This rank's part of a model, in evaluation mode.

    It is read from the rank's own shard, if `tokensieve convert` wrote shards for so many ranks. Otherwise it is sliced
    out of the checkpoint. FP8 blocks stay FP8, if the device can multiply them.

    Raises UserError, on all ranks, as `load` does, and if the number of ranks does not divide the model.
    """
    return mesh.agree(lambda: _load_rank(name, mesh, dtype))


def _load_rank(name: str | Path, mesh: Mesh, dtype: torch.dtype | None) -> DecoderForCausalLM:
    folder, keep_fp8 = model_path(name), fp8.pays(mesh.device)
    shards, this_rank = checkpoint.rank_files(folder), (mesh.rank, mesh.size)
    if mesh.size == 1 and 1 not in shards:
        return load(folder, dtype, mesh.device, keep_fp8=keep_fp8)
    config = model_config(checkpoint.read_config(folder))
    dtype = dtype or (torch.float32 if mesh.device.type == "cpu" else torch.bfloat16)
    with torch.device("meta"):
        model = DecoderForCausalLM(config)
    fp8_names: set[str] = set()
    if mesh.size in shards:
        if keep_fp8:
            fp8_names = fp8.holdable(model, checkpoint.shard_blocks(folder, config, *this_rank))
        tensors = checkpoint.load_shard(folder, config, *this_rank, dtype, fp8_names)
    elif shards:
        count = max(shards)
        raise UserError(
            f"{folder}: holds shards for {count} ranks, and torchrun started {mesh.size}; use --nproc-per-node "
            f"{count}, or convert the checkpoint with --model-parallel {mesh.size}"
        )
    else:
        stored = checkpoint.open_shards(folder)
        checkpoint.check_division(folder, config, stored, mesh.size, whole_blocks=keep_fp8)
        if keep_fp8:
            fp8_names = fp8.holdable(model, checkpoint.block_tensors(folder, config))
        whole = checkpoint.load_tensors(folder, config, dtype, fp8_names)
        tensors = ((name, _slice(name, tensor, mesh)) for name, tensor in whole)
    with torch.device("meta"):
        fp8.hold(model, fp8_names)
    shard(model, mesh)
    fill(model, ((name, tensor.to(mesh.device)) for name, tensor in tensors))
    came_from(model, folder)
    return model.eval()


def shard(model: DecoderForCausalLM, mesh: Mesh) -> None:
    """Reduces a whole model to this rank's part, in place, and adds the ranks' communication in a forward pass."""
    if mesh.size == 1:
        return
    trunk, config = model.model, model.config
    trunk.embed_tokens = VocabularyRows(trunk.embed_tokens, mesh)
    for module in list(trunk.modules()):
        if isinstance(module, DecoderLayer):
            for part in (module.self_attn, module.mlp):
                # Attention and experts return their result beside their output.
                part.register_forward_hook(
                    lambda module, inputs, out: (
                        (mesh.all_reduce(out[0]), *out[1:]) if isinstance(out, tuple) else mesh.all_reduce(out)
                    )
                )
        elif isinstance(module, Attention):
            module.heads //= mesh.size
            module.head_group = MeshHeads(mesh)
        elif isinstance(module, Experts):
            module.first = mesh.rank * (config.n_routed_experts // mesh.size)
    model.lm_head.register_forward_hook(lambda module, inputs, out: torch.cat(mesh.all_gather(out), -1))
    sliced: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in sliced:  # a tied head is the same parameter as the embedding
            local = _slice(name, parameter.detach(), mesh)
            sliced[id(parameter)] = nn.Parameter(local, requires_grad=parameter.requires_grad)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, sliced[id(parameter)])


def _slice(name: str, whole: Tensor, mesh: Mesh) -> Tensor:
    """This rank's part of a tensor, copied, so that the whole need not stay in memory."""
    axis = 0 if ".mlp.experts." in name else checkpoint.shard_axis(name)
    return whole if axis is None else whole.chunk(mesh.size, axis)[mesh.rank].clone()


class VocabularyRows(nn.Embedding):
    """The embedding, of which this rank holds some rows.

    Tokens of other ranks are zero here, so the sum over ranks is the row of the one rank that holds it.
    """

    def __init__(self, embedding: nn.Embedding, mesh: Mesh):
        super().__init__(embedding.num_embeddings // mesh.size, embedding.embedding_dim, device="meta")
        self.weight, self.mesh = embedding.weight, mesh

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids - self.mesh.rank * self.num_embeddings
        local = (rows >= 0) & (rows < self.num_embeddings)
        return self.mesh.all_reduce(F.embedding(rows.where(local, 0), self.weight).masked_fill(~local.unsqueeze(-1), 0))
