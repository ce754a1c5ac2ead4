"""Untrusted programs, isolated and within limits: `run`, `run_many`, `python`. See docs/sandbox.md."""

from tokensieve.sandbox.launch import interpreter, isolation, why_not
from tokensieve.sandbox.program import Limits, Program, Result, python, run, run_many

__all__ = ["Limits", "Program", "Result", "interpreter", "isolation", "python", "run", "run_many", "why_not"]
