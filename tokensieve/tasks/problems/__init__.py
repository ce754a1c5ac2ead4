"""Problems of post-training, one file per domain, under the contract of all tasks.

A domain draws items and grades answers (`problem.Domain`). An agent's has tools too (`problem.Agent`). `Problems` makes
prompts of them: in two modes, thinking at length or answering directly, each after as many worked examples as make the
prompt long enough to select from.
"""

from collections.abc import Mapping
from types import MappingProxyType

from tokensieve.config import UserError
from tokensieve.tasks.problems.answering import Answering
from tokensieve.tasks.problems.coding import Coding
from tokensieve.tasks.problems.logic import Logic
from tokensieve.tasks.problems.mathematics import Mathematics
from tokensieve.tasks.problems.own import own
from tokensieve.tasks.problems.problem import MODES, Agent, Domain, Item, Mode, Problem, Problems, split_thinking
from tokensieve.tasks.problems.programming import Programming
from tokensieve.tasks.problems.rows import Rows
from tokensieve.tasks.problems.search import Search
from tokensieve.tasks.problems.tools import Call, CallFault, Step, Tool
from tokensieve.tasks.problems.writing import Writing

DOMAINS: Mapping[str, Domain] = MappingProxyType(
    {
        domain.name: domain
        for domain in (Mathematics(), Logic(), Programming(), Coding(), Search(), Writing(), Answering())
    }
)

__all__ = [
    "DOMAINS", "MODES", "Agent", "Call", "CallFault", "Domain", "Item", "Mode", "Problem", "Problems", "Rows", "Step",
    "Tool", "domain", "split_thinking",
]  # fmt: skip


def domain(name: str) -> Domain:
    """The domain of this name, of FILE, or of `module:object` (`own`). UserError if there is none."""
    if name in DOMAINS:
        return DOMAINS[name]
    found = own(name, DOMAINS)
    if found.name in DOMAINS:
        raise UserError(f"domain {name} would be called {found.name!r}, as one that is there; give it another name")
    return found
