"""The model: DeepSeek's decoder with a lightning indexer, as a Hugging Face `PreTrainedModel`."""

from tokensieve.model.cache import LatentCache
from tokensieve.model.kl import KLScale
from tokensieve.model.loading import check_tokenizer, load, load_tokenizer, model_path, save, save_indexers, sparsify
from tokensieve.model.parallel import Ranks, joined, load_rank
from tokensieve.model.selection import SelectionContext, selecting
from tokensieve.model.transformer import DecoderForCausalLM, Trunk

__all__ = [
    "DecoderForCausalLM",
    "KLScale",
    "LatentCache",
    "Ranks",
    "SelectionContext",
    "Trunk",
    "check_tokenizer",
    "joined",
    "load",
    "load_rank",
    "load_tokenizer",
    "model_path",
    "save",
    "save_indexers",
    "selecting",
    "sparsify",
]
