"""Measurements of the engine: what `tokensieve bench` runs."""

from tokensieve.bench.load import Served, Workload, serve_load
from tokensieve.bench.random_model import random_model, random_prompts

__all__ = ["Served", "Workload", "random_model", "random_prompts", "serve_load"]
