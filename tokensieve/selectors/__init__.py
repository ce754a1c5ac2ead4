"""Selectors beside DSA's top k: to use, to compare, and to start from.

Each is a frozen dataclass that is called with a `SelectionContext` and holds its options. On the command line it is
written as in Python:

    tokensieve eval sparse --arm "recent=tokensieve.selectors:Recent(last=64)"

docs/selection.md says what each is worth.
"""

from tokensieve.selectors.budget import PerLayer, PerQuery
from tokensieve.selectors.mixture import DenseBelow, DenseIfSpread, DenseLayers
from tokensieve.selectors.recent import Recent
from tokensieve.selectors.sharing import Shared
from tokensieve.selectors.two_level import TwoLevel

__all__ = [
    "DenseBelow",
    "DenseIfSpread",
    "DenseLayers",
    "PerLayer",
    "PerQuery",
    "Recent",
    "Shared",
    "TwoLevel",
]
