"""The cases that every backend's ops must pass, as data, and the tensors that a case stands for.

A case names shapes, documents and content; `make` turns it into inputs on a device, from the case's own seed, the same
on every machine (they are drawn on the CPU in float64 and then rounded to the case's dtype). The cases are cheap enough
for the float64 oracle of tests/support/oracle.py, and a GPU run can reuse them all.

Legend: S query tokens, T key tokens, H heads, G key-value groups, E entry width, V value width, I index heads, D width,
K selected.
"""

import math
import zlib
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tests.support import oracle


@dataclass(frozen=True)
class Document:
    """`queries` query tokens: the last ones of `keys` key tokens that begin at key position `start`; causal.

    keys = 0: the queries see nothing. queries < keys: a later chunk of a prefill, or one decode step.
    """

    start: int
    keys: int
    queries: int

    def ranges(self) -> list[tuple[int, int]]:
        if self.keys == 0:
            return [(self.start, self.start)] * self.queries
        first = self.start + self.keys - self.queries + 1
        return [(self.start, first + i) for i in range(self.queries)]


def causal(*lengths: int) -> tuple[Document, ...]:
    """Documents packed one after the other, each with all of its own queries."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return tuple(Document(start, length, length) for start, length in zip(starts, lengths, strict=True))


@dataclass(frozen=True)
class Case:
    """content: what the numbers are.

    normal        independent N(0, 1) entries times `magnitude`; q_I and k_I rounded to 1/64, so that every q_I . k_I is
                  exact in float32 in any order: no backend can land on the oracle's other side of the ReLU's kink
    integers      small integers times `magnitude` (a power of two): every dot product is exact in float32 in any
                  order, so scores tie often and exactly, and huge logits still have one right answer
    equal_keys    all keys (and entries) are the same vector: every score of a query ties
    zero_scores   no q_I . k_I is positive: every index score is a zero of ReLU, of either sign (w has both)
    none_selected normal, but every entry of indices is -1
    """

    name: str
    documents: tuple[Document, ...]
    keys: int
    k: int
    heads: int = 4
    groups: int = 1
    entry: int = 24
    d_k: int = 24
    v_start: int = 0
    d_v: int = 16
    index_heads: int = 4
    index_dim: int = 16
    dtype: str = "float32"
    magnitude: float = 1.0
    content: str = "normal"

    def __str__(self) -> str:
        return self.name

    @property
    def queries(self) -> int:
        return sum(document.queries for document in self.documents)


@dataclass(frozen=True)
class Inputs:
    """One case's tensors. indices_SK is the oracle's own selection from the oracle's scores."""

    q_SHD: Tensor
    kv_TGE: Tensor
    q_SID: Tensor
    k_TD: Tensor
    w_SI: Tensor
    starts_S: Tensor
    ends_S: Tensor
    indices_SK: Tensor
    scale: float
    k: int
    parts: dict[str, int] = field(default_factory=dict)
    """d_k, v_start, d_v: how an entry splits into key and value."""

    @property
    def k_TGD(self) -> Tensor:
        return self.kv_TGE[..., : self.parts["d_k"]]

    @property
    def v_TGV(self) -> Tensor:
        return self.kv_TGE[..., self.parts["v_start"] : self.parts["v_start"] + self.parts["d_v"]]

    def visible_ST(self) -> Tensor:
        positions_T = torch.arange(self.kv_TGE.shape[0], device=self.starts_S.device)
        return (positions_T >= self.starts_S[:, None]) & (positions_T < self.ends_S[:, None])

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers held in another dtype (the selection stays)."""
        names = ("q_SHD", "kv_TGE", "q_SID", "k_TD", "w_SI")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})


def inverse_root(n: int) -> float:
    """The power of two nearest n ** -0.5: scaling by it keeps the exact contents exact."""
    return 2.0 ** -round(math.log2(n) / 2)


def make(case: Case, device: str = "cpu") -> Inputs:
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    S, T = case.queries, case.keys

    def draw(*shape: int) -> Tensor:
        if case.content == "integers":
            return torch.randint(-2, 3, shape, generator=generator).double() * case.magnitude
        return torch.randn(shape, generator=generator, dtype=torch.float64) * case.magnitude

    q_SHD, kv_TGE = draw(S, case.heads, case.d_k), draw(T, case.groups, case.entry)
    q_SID, k_TD, w_SI = draw(S, case.index_heads, case.index_dim), draw(T, case.index_dim), draw(S, case.index_heads)
    if case.content != "integers":
        q_SID, k_TD = (q_SID * 64).round() / 64, (k_TD * 64).round() / 64
    w_SI = w_SI * inverse_root(case.index_heads * case.index_dim)
    if case.content == "equal_keys":
        kv_TGE, k_TD = kv_TGE[:1].expand_as(kv_TGE).clone(), k_TD[:1].expand_as(k_TD).clone()
    if case.content == "zero_scores":
        q_SID, k_TD = q_SID.abs(), -k_TD.abs()
    ranges = [span for document in case.documents for span in document.ranges()]
    starts_S, ends_S = torch.tensor(ranges, dtype=torch.int32).reshape(S, 2).unbind(1)
    dtype = getattr(torch, case.dtype)
    q_SHD, kv_TGE, q_SID, k_TD, w_SI = (x.to(dtype) for x in (q_SHD, kv_TGE, q_SID, k_TD, w_SI))
    if case.content == "none_selected":
        indices_SK = torch.full((S, case.k), -1, dtype=torch.int32)
    else:
        indices_SK = oracle.select_topk(oracle.index_scores(q_SID, k_TD, w_SI), case.k, starts_S, ends_S)
    tensors = (q_SHD, kv_TGE, q_SID, k_TD, w_SI, starts_S.contiguous(), ends_S.contiguous(), indices_SK)
    return Inputs(
        *(x.to(device) for x in tensors),
        scale=inverse_root(case.d_k),
        k=case.k,
        parts={"d_k": case.d_k, "v_start": case.v_start, "d_v": case.d_v},
    )


ODD_RAGGED = causal(1, 37, 2, 64, 1, 1, 25)

CASES = (
    Case("plain causal", causal(48), keys=48, k=8),
    Case("ragged pack, T a multiple of nothing", ODD_RAGGED, keys=131, k=7),
    Case("ragged pack, keys nobody sees", (Document(5, 13, 13), Document(29, 7, 7)), keys=43, k=5),
    Case("one-token documents", causal(*[1] * 19), keys=19, k=4),
    Case("T < k", causal(13), keys=13, k=32),
    Case("k = 1", causal(9, 31), keys=40, k=1),
    Case("one query, one key", causal(1), keys=1, k=4),
    Case("no key tokens", (Document(0, 0, 3),), keys=0, k=4),
    Case("one key, many queries", tuple(Document(0, 1, 1) for _ in range(17)), keys=1, k=2),
    Case("decode step", (Document(0, 149, 1),), keys=149, k=16),
    Case("decode of a batch", (Document(0, 50, 1), Document(50, 3, 1), Document(53, 77, 1)), keys=130, k=8),
    Case("prefill chunk", (Document(0, 97, 21),), keys=97, k=16),
    Case("prefill chunks of a batch", (Document(0, 40, 9), Document(40, 1, 1), Document(41, 60, 33)), keys=101, k=8),
    Case("sliding windows", tuple(Document(i, 12, 1) for i in range(40)), keys=51, k=5),
    Case("empty rows", (Document(0, 0, 2), Document(3, 20, 20), Document(23, 0, 3), Document(30, 9, 9)), keys=39, k=6),
    Case("only empty rows", (Document(0, 0, 3), Document(8, 0, 2)), keys=8, k=6),
    Case("nothing selected", causal(11), keys=11, k=6, content="none_selected"),
    Case("equal keys", causal(20, 35), keys=55, k=8, content="equal_keys"),
    Case("zero scores", causal(20, 35), keys=55, k=8, content="zero_scores"),
    Case("integer ties", ODD_RAGGED, keys=131, k=9, content="integers", index_heads=2, index_dim=4),
    Case("huge exact logits", causal(40, 23), keys=63, k=8, content="integers", magnitude=2.0**12),
    Case("large exact logits", causal(40, 23), keys=63, k=8, content="integers", magnitude=2.0**4),
    Case("tiny exact logits", causal(40, 23), keys=63, k=8, content="integers", magnitude=2.0**-24),
    Case("128 heads", (Document(0, 33, 5),), keys=33, k=8, heads=128, index_heads=64),
    Case("3 heads", causal(17, 24), keys=41, k=8, heads=3, index_heads=3),
    Case("5 index heads of 24", causal(17, 24), keys=41, k=8, index_heads=5, index_dim=24),
    Case("index shape of the 671B model", (Document(0, 70, 6),), keys=70, k=16, index_heads=64, index_dim=128),
    Case(
        "grouped-query entries", causal(21, 30), keys=51, k=8, heads=6, groups=2, entry=32, d_k=16, v_start=16, d_v=16
    ),
    Case("value apart from key", causal(29), keys=29, k=8, heads=4, groups=4, entry=40, d_k=12, v_start=20, d_v=7),
    Case("MLA widths", (Document(0, 67, 5),), keys=67, k=16, heads=16, entry=576, d_k=576, d_v=512),
    Case("past one block of queries and keys", (Document(0, 300, 70), Document(300, 333, 75)), keys=633, k=40, heads=2),
)
