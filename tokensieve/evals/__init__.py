"""What was lost and what was gained: parity of dense and sparse, long contexts, decode time. Functions from models
and data to figures.

Losses are in nats a token, shares in [0, 1], times in milliseconds where the name says ms.
"""

from tokensieve.config import AcceptanceSizes
from tokensieve.evals.criteria import Criterion, acceptance_criteria, parity_criteria
from tokensieve.evals.judge import judge_sparse
from tokensieve.evals.longcontext import FULL, QUICK, acceptance, context_gain, needle_heat
from tokensieve.evals.mass import Recall, recall
from tokensieve.evals.parity import ARMS, Arm, Score, arms_of, compare, demo_arms, loss_by_position, metrics_of
from tokensieve.evals.text import Perplexity, perplexity, text_sequences, token_losses
from tokensieve.evals.timing import decode_ms, kv_entries

__all__ = [
    "ARMS",
    "FULL",
    "QUICK",
    "AcceptanceSizes",
    "Arm",
    "Criterion",
    "Perplexity",
    "Recall",
    "Score",
    "acceptance",
    "acceptance_criteria",
    "arms_of",
    "compare",
    "context_gain",
    "decode_ms",
    "demo_arms",
    "judge_sparse",
    "kv_entries",
    "loss_by_position",
    "metrics_of",
    "needle_heat",
    "parity_criteria",
    "perplexity",
    "recall",
    "text_sequences",
    "token_losses",
]
