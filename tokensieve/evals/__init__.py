"""What was lost and what was gained: parity of dense and sparse, long contexts, decode time. Functions from models
and data to figures.

Losses are in nats per token, shares in [0, 1], times in milliseconds if the name says ms.
"""

from tokensieve.evals.against_dense import judge_parity
from tokensieve.evals.budget import fitted_k, fitted_query_share
from tokensieve.evals.choices import choose
from tokensieve.evals.criteria import Criterion, acceptance_criteria, parity_criteria
from tokensieve.evals.diagnosis import FAULTS, Fault, diagnose
from tokensieve.evals.endpoint import Endpoint
from tokensieve.evals.evaluation import Evaluation, Record, evaluate
from tokensieve.evals.finished import Finished
from tokensieve.evals.judge import judge_sparse
from tokensieve.evals.longcontext import acceptance, context_gain, needle_heat
from tokensieve.evals.losses import Perplexity, perplexity, text_sequences, token_losses
from tokensieve.evals.mass import Recall, recall
from tokensieve.evals.parity import (
    ARMS,
    Arm,
    ArmScores,
    arms_of,
    compare,
    demo_arms,
    loss_by_position,
    metrics_of,
    shared_texts,
)
from tokensieve.evals.progress import OnProgress
from tokensieve.evals.serving import Checker, ProbeResult, check_serving
from tokensieve.evals.sharing import greedy_choice
from tokensieve.evals.suites import checked_tasks, judge_long, judge_short, long_arms, short_arms
from tokensieve.evals.timing import CHUNK, cache_reads, context_ms, crossover

__all__ = [
    "ARMS",
    "CHUNK",
    "Arm",
    "ArmScores",
    "Checker",
    "Criterion",
    "Endpoint",
    "Evaluation",
    "FAULTS",
    "Fault",
    "Finished",
    "OnProgress",
    "Perplexity",
    "ProbeResult",
    "Recall",
    "Record",
    "acceptance",
    "acceptance_criteria",
    "arms_of",
    "cache_reads",
    "check_serving",
    "checked_tasks",
    "choose",
    "compare",
    "context_gain",
    "context_ms",
    "crossover",
    "demo_arms",
    "diagnose",
    "evaluate",
    "fitted_k",
    "fitted_query_share",
    "greedy_choice",
    "judge_long",
    "judge_parity",
    "judge_short",
    "judge_sparse",
    "long_arms",
    "loss_by_position",
    "metrics_of",
    "needle_heat",
    "parity_criteria",
    "perplexity",
    "recall",
    "shared_texts",
    "short_arms",
    "text_sequences",
    "token_losses",
]
