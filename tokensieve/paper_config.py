"""Settings of `tokensieve eval --suite paper`, as a frozen dataclass (see `tokensieve.config`)."""

from dataclasses import dataclass
from typing import Literal

from tokensieve.config import UserError


@dataclass(frozen=True)
class PaperConfig:
    """Which of the paper's benchmarks are asked, how much, and who helps. Zero: as the table of benchmarks has it."""

    benchmarks: tuple[str, ...] = ()  # by key, such as aime25; none: all
    model: str = ""  # id at the endpoint; empty: the first one that it serves
    data: str = ""  # folder with copies of the data, a folder for each benchmark; empty: the harnesses fetch them
    hub: Literal["modelscope", "huggingface"] = "modelscope"  # from where evalscope fetches them
    limit: int = 0  # problems of each benchmark (evalscope: of each of its subsets); 0: all
    repeats: int = 0  # answers to each problem
    context: int = 0  # tokens of the model's longest prompt and answer together; 0: as many as the endpoint lists
    max_tokens: int = (
        0  # of an answer, with its thoughts; by default never more than half of the context, agents an eighth
    )
    temperature: float = 1.0  # with top_p, what DeepSeek recommends for V3.2; the paper names none
    top_p: float = 0.95
    at_once: int = 8  # requests
    seconds: float = 3600.0  # for the whole of one answer
    retries: int = 4  # of a request that was refused because of its rate, or that failed on the way
    judge_url: str = ""  # OpenAI-compatible endpoint, with its /v1, of the model that grades answers in words
    judge_model: str = ""  # its id; the key is read from JUDGE_API_KEY
    search_url: str = ""  # MCP server, over HTTP, whose tools search and read the web
    steps: int = 100  # of an agent that searches, at most

    def __post_init__(self) -> None:
        for name, least in (
            ("limit", 0),
            ("repeats", 0),
            ("context", 0),
            ("max_tokens", 0),
            ("retries", 0),
            ("at_once", 1),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.steps < 1 or self.seconds <= 0 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError("steps must be at least 1, seconds above 0, temperature 0 or more, top_p in (0, 1]")
        if bool(self.judge_url) != bool(self.judge_model):
            raise UserError("a judge needs judge_url and judge_model; give both, or neither")
