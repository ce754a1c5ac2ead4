"""The judge of a run: the scripted one, a model that our own server serves, or one behind an endpoint.

The command starts the first two itself, on loopback. They end with the block, and with the command if it is killed.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tokensieve.config import UserError
from tokensieve.evals.endpoint import Endpoint, served_model
from tokensieve.posttrain.agreement import check_agreement, measure_agreement
from tokensieve.posttrain.judge import Criterion, Judge, JudgeSettings, Question
from tokensieve.posttrain.mixture import Asked
from tokensieve.posttrain.scripted_judge import NAME, scripted_judge
from tokensieve.posttrain_config import PosttrainConfig
from tokensieve.server_process import NotServed, server_process

CACHE, LOG = "judge.sqlite", "judge-server.log"  # in the run folder
AGREEMENT = "judge_agreement"  # in metrics.json
AT_ONCE, PAGES = 8, 512  # of an embedded judge: eight questions of 4096 tokens, however large the GPU is


@contextmanager
def judging(config: PosttrainConfig, asked: Asked) -> Iterator[Judge | None]:
    """Within the block: the judge, if a problem has a rubric, else None. Its replies are kept in the run folder.

    UserError for a model that cannot be served.
    """
    if not _needed(asked):
        yield None
        return
    with _settings(config) as settings, Judge(settings, Path(config.out) / CACHE) as judge:
        yield judge


def check_judge(config: PosttrainConfig, asked: Asked, found: dict[str, Any], note: Callable[[], None]) -> None:
    """Asks the judge, if one is needed, for a right answer of each group, and measures how it agrees with the rules.

    found: metrics.json's figures, to which the agreement is added for groups that have none. note: writes them.

    UserError for a judge that cannot be served, refuses, scores none of these answers, or agrees less than is wanted.
    """
    if not _needed(asked):
        return
    if config.judge.embedded:
        note()  # first, so that the folder is a run's before it holds the server's log
    with _settings(config) as settings:
        with Judge(settings) as judge:  # that has kept no reply
            _check_replies(judge, asked)
        if config.judge.model == NAME:
            return
        note()
        with Judge(settings, Path(config.out) / CACHE) as judge:
            found[AGREEMENT] = measure_agreement(judge, [group for group, _ in asked], found.get(AGREEMENT, {}))
        note()
    check_agreement(found[AGREEMENT], config.judge.agreement)


def _needed(asked: Asked) -> bool:
    return any(example.item.rubric for _, examples in asked for example in examples)


def _check_replies(judge: Judge, asked: Asked) -> None:
    shown = [next((example for example in examples if example.item.rubric), None) for _, examples in asked]
    scores = judge.scores(
        [Question(e.item.question, e.item.answer, tuple(map(Criterion, e.item.rubric))) for e in shown if e]
    )
    if all(score is None for score in scores):
        raise UserError(
            f"judge {judge.name} scores no right answer, as the log says; name another one with judge.model, and with "
            "judge.url if a server has it"
        )


@contextmanager
def _settings(config: PosttrainConfig) -> Iterator[JudgeSettings]:
    """Of the judge, which answers as long as the block lasts."""
    judge = config.judge
    if judge.model == NAME:
        with scripted_judge() as url:
            yield JudgeSettings(url, NAME, budget=judge.budget)
    elif not judge.embedded:
        key = os.environ.get("OPENAI_API_KEY", "none")
        yield JudgeSettings(judge.url, judge.model, key, judge.budget, timeout=judge.timeout)
    else:
        log = Path(config.out) / LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        options = ("--running", str(AT_ONCE), "--pages", str(PAGES), "--no-dense")
        with ExitStack() as stack:
            try:
                url = stack.enter_context(server_process(judge.model, config.device, options=options, log=log))
            except NotServed as error:
                raise UserError(
                    f"judge.model {judge.model} cannot be served: {error}; see {log}, and name another model, or give "
                    "judge.url for one of a server"
                ) from error
            model, _ = served_model(Endpoint(url), "", "")
            yield JudgeSettings(
                url, model, budget=judge.budget, timeout=judge.timeout, at_once=AT_ONCE, name=judge.model, log=str(log)
            )
