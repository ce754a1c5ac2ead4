"""The 14 benchmarks of the paper's Table 1: one table, of who runs each, how, and what it needs.

A score is a share in [0, 1], shown in percent, but for Codeforces, whose score is a rating. The paper's two columns are
DeepSeek-V3.1-Terminus (dense) and DeepSeek-V3.2-Exp (sparse).

Source: DeepSeek-V3.2-Exp technical report, Table 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Need = Literal["data", "containers", "network", "judge", "search", "reachable"]

# reachable: from inside of a container, where the loopback interface is another one.
NEEDS: dict[Need, str] = {
    "data": "a copy in DATA/KEY, or the hub",
    "containers": "Docker",
    "network": "images and packages from the internet",
    "judge": "a model that grades answers in words",
    "search": "tools that search and read the web",
    "reachable": "an endpoint that containers reach",
}

BEFORE, AFTER = "V3.1-Terminus", "V3.2-Exp"  # the paper's columns


@dataclass(frozen=True)
class Benchmark:
    """A row of the table.

    Attributes:
        key: its name in settings, folders and figures.
        name: as the paper has it, with its metric.
        group: the paper's.
        before, after: the paper's figures, in percent, or a rating.
        harness: a key of `harnesses.HARNESSES`; "own": `tokensieve.evals.paper.codeforces`.
        task: the harness's name of it.
        metric: of one answer, as the harness calls it; in [0, 1].
        needs: beside the harness itself.
        repeats: answers to each problem, unless the settings say otherwise.
        max_tokens: of an answer, likewise; of an agent each step's.
        agent: answers in many steps, whose prompts grow.
        options: of the task, in the harness's terms.
        host: from where the data come, unless it is the hub of the settings.
        note: how this differs from what the paper did, as far as it is known.
    """

    key: str
    name: str
    group: str
    before: float
    after: float
    harness: str
    task: str
    metric: str
    needs: tuple[Need, ...]
    repeats: int = 1
    max_tokens: int = 65536
    agent: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    host: str = ""
    note: str = ""

    @property
    def is_rating(self) -> bool:
        return self.metric == "rating"


DATA: tuple[Need, ...] = ("data",)
SEARCH: tuple[Need, ...] = ("data", "judge", "search")
AGENT: tuple[Need, ...] = ("data", "containers", "network")
STEPS: dict[str, Any] = {"agent": True, "max_tokens": 16384}
TOOLS = "with the search tools that you give"

# fmt: off
BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("mmlu_pro", "MMLU-Pro (EM)", "General", 85.0, 85.0, "evalscope", "mmlu_pro", "accuracy", DATA),
    Benchmark("gpqa_diamond", "GPQA-Diamond (Pass@1)", "General", 80.7, 79.9, "evalscope", "gpqa_diamond", "accuracy",
              DATA, repeats=4),
    Benchmark("hle", "Humanity's Last Exam (Pass@1)", "General", 21.7, 19.8, "evalscope", "hle", "acc",
              ("data", "judge"), options={"extra_params": {"include_multi_modal": False}},
              note="questions without pictures"),
    Benchmark("browsecomp", "BrowseComp (Acc.)", "Search Agent", 38.5, 40.1, "evalscope", "browsecomp", "is_correct",
              SEARCH, note=TOOLS, **STEPS),
    Benchmark("browsecomp_zh", "BrowseComp_zh (Acc.)", "Search Agent", 45.0, 47.9, "evalscope", "browsecomp",
              "is_correct", SEARCH, note=f"{TOOLS}; asked and graded as BrowseComp is, in English words", **STEPS),
    Benchmark("simple_qa", "SimpleQA (Acc.)", "Search Agent", 96.8, 97.1, "evalscope", "simple_qa", "is_correct",
              SEARCH, note=TOOLS, **STEPS),
    Benchmark("live_code_bench", "LiveCodeBench (Pass@1)", "Code", 74.9, 74.1, "evalscope-agents", "live_code_bench",
              "acc", ("data", "containers"), note="problems from August 2024 to May 2025",
              options={"subset_list": ["release_v6"],
                       "extra_params": {"start_date": "2024-08-01", "end_date": "2025-05-31"}}),
    Benchmark("codeforces", "Codeforces-Div1 (Rating)", "Code", 2046, 2121, "own", "open-r1/codeforces", "rating",
              DATA, host="huggingface.co", note="Python programs; the rating that makes what was solved most likely"),
    Benchmark("aider_polyglot", "Aider-Polyglot (Acc.)", "Code", 76.1, 74.5, "harbor", "aider-polyglot@1.0", "reward",
              (*AGENT, "reachable"), host="hub.harborframework.com", note="sampled as Aider does"),
    Benchmark("swe_verified", "SWE Verified (Agent mode)", "Code Agent", 68.4, 67.8, "evalscope-agents",
              "swe_bench_verified_agentic", "acc", AGENT, **STEPS),
    Benchmark("swe_multilingual", "SWE-bench Multilingual (Agent mode)", "Code Agent", 57.8, 57.9, "evalscope-agents",
              "swe_bench_multilingual_agentic", "acc", AGENT, **STEPS),
    Benchmark("terminal_bench", "Terminal-bench (Terminus)", "Code Agent", 36.7, 37.7, "evalscope-agents",
              "terminal_bench_v2", "acc", ("containers", "network"), host="hub.harborframework.com", **STEPS,
              note="version 2 with Terminus 2; the paper's columns: version 1 with Terminus 1"),
    Benchmark("aime25", "AIME 2025 (Pass@1)", "Math", 88.4, 89.3, "evalscope", "aime25", "acc", DATA, repeats=16),
    Benchmark("hmmt25", "HMMT 2025 (Pass@1)", "Math", 86.1, 83.6, "evalscope", "hmmt25", "acc", DATA, repeats=16),
)
# fmt: on

BY_KEY: Mapping[str, Benchmark] = {benchmark.key: benchmark for benchmark in BENCHMARKS}
