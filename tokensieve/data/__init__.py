"""Text to training sequences: sources, the tokenizer, the token store, packing with document bounds, mixing."""

from tokensieve.data.packing import PackedDataset, build_dataset, text_source
from tokensieve.data.sample import sample_rows
from tokensieve.data.sources import licences, read_documents
from tokensieve.data.store import TokenStore
from tokensieve.data.tokenizer import train_tokenizer
from tokensieve.tasks.documents import Document, canonical_name, is_held_out

__all__ = [
    "Document",
    "PackedDataset",
    "TokenStore",
    "build_dataset",
    "canonical_name",
    "is_held_out",
    "licences",
    "read_documents",
    "sample_rows",
    "text_source",
    "train_tokenizer",
]
