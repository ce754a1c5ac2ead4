"""tokensieve: DeepSeek Sparse Attention for any decoder language model, end to end."""

from tokensieve import ops
from tokensieve.config import SparseConfig, UserError
from tokensieve.model import LatentCache, load, load_tokenizer, save, selecting, sparsify

__all__ = ["LatentCache", "SparseConfig", "UserError", "load", "load_tokenizer", "ops", "save", "selecting", "sparsify"]

__version__ = "0.1.0"
