"""Whether sparse attention pays for a user's own model and data: what is measured, and what follows from it.

Lengths are in tokens, shares in [0, 1]. `top_k` and k are keys per query.
"""

from tokensieve.profile.job import profile
from tokensieve.profile.lengths import Sample, read_sample

__all__ = ["Sample", "profile", "read_sample"]
