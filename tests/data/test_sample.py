"""Rows of a source's text, for what reads activations."""

import pytest
import torch

from tests.support import stdlib
from tokensieve.config import UserError
from tokensieve.data import Document, sample_rows


def test_documents_are_joined_and_cut(tmp_path) -> None:
    documents = stdlib.documents("argparse", "textwrap", "random")
    tokenizer = stdlib.tokenizer(documents, tmp_path, 512)
    ids = sample_rows(tokenizer, documents, 2, 300)
    assert ids.shape == (2, 300) and ids.dtype == torch.int64
    assert ids.flatten()[0] == tokenizer.bos_token_id
    texts = [tokenizer.decode(tokenizer(d.text, add_special_tokens=False)["input_ids"][:299]) for d in documents]
    assert tokenizer.decode(ids[0][1:]) in texts
    assert torch.equal(ids, sample_rows(tokenizer, documents[::-1], 2, 300))  # an order of names
    few = [Document("few", documents[1].text[:4000])]
    assert 256 <= sample_rows(tokenizer, few, 2, 4096).shape[1] < 4096
    with pytest.raises(UserError, match="give at least 512"):
        sample_rows(tokenizer, [Document("one", "a few words")], 2, 4096)
