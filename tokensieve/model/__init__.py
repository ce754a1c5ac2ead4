"""The model: a decoder of a known family, dense or with a lightning indexer, as a Hugging Face `PreTrainedModel`."""

from tokensieve.model import auto
from tokensieve.model.cache import LatentCache
from tokensieve.model.causal import DecoderForCausalLM
from tokensieve.model.context import ForwardOptions, selecting, with_options
from tokensieve.model.files import model_path
from tokensieve.model.kl import KLScale, Objective
from tokensieve.model.loading import load, save, save_indexers, sparsify
from tokensieve.model.selection import SelectionContext, join
from tokensieve.model.sharing import share
from tokensieve.model.tokenizer import check_tokenizer, load_tokenizer
from tokensieve.model.transformer import Trunk

__all__ = [
    "DecoderForCausalLM",
    "ForwardOptions",
    "KLScale",
    "LatentCache",
    "Objective",
    "SelectionContext",
    "Trunk",
    "check_tokenizer",
    "join",
    "load",
    "load_tokenizer",
    "model_path",
    "save",
    "save_indexers",
    "selecting",
    "share",
    "sparsify",
    "with_options",
]

auto.register()
