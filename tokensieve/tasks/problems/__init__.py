"""Problems of post-training, one file per domain, under the contract of all tasks.

A domain draws items and grades answers (`problem.Domain`). `Problems` makes prompts of them: in two modes, thinking at
length or answering directly, each after as many worked examples as make the prompt long enough to select from.
"""

from collections.abc import Mapping
from types import MappingProxyType

from tokensieve.config import UserError
from tokensieve.tasks.problems.logic import Logic
from tokensieve.tasks.problems.mathematics import Mathematics
from tokensieve.tasks.problems.problem import MODES, Domain, Item, Mode, Problem, Problems, split_thinking
from tokensieve.tasks.problems.programming import Programming
from tokensieve.tasks.problems.writing import Writing

DOMAINS: Mapping[str, Domain] = MappingProxyType(
    {domain.name: domain for domain in (Mathematics(), Logic(), Programming(), Writing())}
)

__all__ = ["DOMAINS", "MODES", "Domain", "Item", "Mode", "Problem", "Problems", "domain", "split_thinking"]


def domain(name: str) -> Domain:
    """The domain of this name. UserError if there is none."""
    if name not in DOMAINS:
        raise UserError(f"domain {name!r} is unknown; use one of {', '.join(DOMAINS)}")
    return DOMAINS[name]
