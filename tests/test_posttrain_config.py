"""Configs of post-training that are refused when they are read."""

import pytest

from tokensieve.config import UserError, load_config
from tokensieve.posttrain_config import PosttrainConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("modes=[]", "modes is []; name one or both of think, direct"),
        ('domains=["logic", "logic"]', "domains is ['logic', 'logic']; name each once"),
        ("cold.micro_batch=3", "micro_batch is 3; it must divide rows"),
        ("specialist.samples=1", "samples is 1; a group of GRPO has at least 2 answers"),
        ("rl.train.micro_batch=3", "micro_batch is 3; it must divide prompts * samples"),
        ("difficulty.high=0.05", "difficulty.low is 0.1 and high 0.05"),
        ("distill.passing=0", "distill.passing is 0.0; it must be a score above 0"),
        ("reward.length=-1", "reward.length is -1.0; give a number of at least 0"),
        ("reward.free=1", "reward.free is 1.0; it must be a share below 1"),
        ("rl.ratios.logic=-1", "rl.ratios.logic is -1.0; give a finite number"),
        ("judge.url=http://a/v1", "judge.url is 'http://a/v1', and judge.model is scripted, as by default"),
        ("judge.model=", "judge.model is empty; name a model"),
        ("judge.budget=0", "judge.budget is 0; it must be at least 1"),
        *(
            (f"judge.timeout={seconds}", f"judge.timeout is {seconds}; give seconds")
            for seconds in ("-1.0", "nan", "inf")
        ),
        ("judge.agreement=1.5", "judge.agreement is 1.5; give Somers' d from 0 to 1"),
        ("evaluation=0", "evaluation is 0; it must be at least 1"),
        *((f"{name}.lr={lr}", "lr is ") for name in ("cold", "rl.train", "distill.on_policy") for lr in ("-1", "nan")),
        ("specialist.options.max_steps=9", "options.max_steps would contradict steps; set that instead"),
        ("cold.options.logging_steps=9", "options.logging_steps: every step is logged"),
        ("save_every=-1", "save_every is -1; give 0 or more steps"),
        ("seed=-1", "seed is -1; give a whole number from 0 to"),
        ("cold_steps.logic=0", "cold_steps.logic is 0; it must be at least 1"),
        ("rl.train.lora.merge=false", "lora.merge is false; the next stage starts from the merged model"),
        ('selection="window"', "selection"),
    ],
)
def test_refused_at_once(change: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config(PosttrainConfig, "posttrain-tiny", (change,))
    assert message in str(raised.value)
