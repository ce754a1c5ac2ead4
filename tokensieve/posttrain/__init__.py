"""Post-training: rewards, rollouts, and the parts of the pipeline, which `tokensieve.pipeline` puts together.

Rewards are functions of texts and numbers, so that TRL, verl and evaluation call the same ones.
"""

from tokensieve.posttrain.judge import Criterion, Judge, JudgeSettings, Question
from tokensieve.posttrain.language import LanguageShare
from tokensieve.posttrain.replay import replaying
from tokensieve.posttrain.rewards import Terms, Weights, length_penalty, reward
from tokensieve.posttrain.rollouts import Rollout, Rollouts
from tokensieve.posttrain.scripted_judge import scripted_judge

__all__ = [
    "Criterion",
    "Judge",
    "JudgeSettings",
    "LanguageShare",
    "Question",
    "Rollout",
    "Rollouts",
    "Terms",
    "Weights",
    "length_penalty",
    "replaying",
    "reward",
    "scripted_judge",
]
