"""`tokensieve eval MODEL_OR_URL --suite paper`: the 14 benchmarks of the paper's Table 1, through kept harnesses.

`benchmarks` is the table of them, `needs` what they lack here, `harnesses` their environments, `suite` the run. Each
harness has a file that writes its command and reads what it leaves behind.
"""

from tokensieve.evals.paper.benchmarks import AFTER, BEFORE, BENCHMARKS, BY_KEY, Benchmark
from tokensieve.evals.paper.suite import LACKING, compare_models, judge_paper

__all__ = ["AFTER", "BEFORE", "BENCHMARKS", "BY_KEY", "Benchmark", "LACKING", "compare_models", "judge_paper"]
