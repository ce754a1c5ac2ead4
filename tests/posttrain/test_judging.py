"""The judge of a run: started only for rubrics, embedded, behind an endpoint; asked and measured before it is used."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from openai import OpenAI
from rich.console import Console

import tokensieve
from tests.support import commands, models
from tests.support.endpoints import answering, said
from tokensieve import pipeline
from tokensieve.config import UserError, load_config
from tokensieve.posttrain import Criterion, JudgeSettings, Question, mixture
from tokensieve.posttrain import judging as module
from tokensieve.posttrain.agreement import measure_agreement
from tokensieve.posttrain.groups import groups_of
from tokensieve.posttrain.judge import Judge
from tokensieve.posttrain.judging import check_judge, judging
from tokensieve.posttrain.parts import Parts
from tokensieve.posttrain_config import PosttrainConfig
from tokensieve.tasks import encoder
from tokensieve.tasks.problems import domain


@pytest.fixture(scope="module")
def encode():
    return encoder(tokensieve.load_tokenizer("base"))


def settings(out: Path, *changes: str) -> PosttrainConfig:
    small = ("tokens=60", "new_tokens=64", "reward.language=0", "reward.length=0", "device=cpu", f"out={out}")
    return load_config(PosttrainConfig, "posttrain-tiny", (*small, *changes))


def asked(config: PosttrainConfig, encode, *domains: str) -> Any:
    return [(group, group.examples("train", 2, 0)) for group in groups_of(config, [*map(domain, domains)], encode, {})]


def noted() -> None:
    """What writes metrics.json, in place of a run."""


def test_the_judge_is_started_only_for_rubrics_and_ends_with_the_block(encode, tmp_path: Path, monkeypatch) -> None:
    config = settings(tmp_path)
    with judging(config, asked(config, encode, "logic")) as judge:
        assert judge is None
    groups = asked(config, encode, "writing")
    with judging(config, groups) as judge:
        assert judge is not None and judge.name == "scripted"
        url, (group, examples) = judge.settings.url, groups[1]
        (reward,) = (r for r in mixture.rewards(groups, encode, config, judge) if r.__name__ == group.name)
        answer = [*encode.solution(examples[0].demonstration), *encode.chat().close]
        assert reward(completion_ids=[answer], number=[0], task=[group.name])[0] > 1.9  # the outcome and the rubric
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with judging(settings(tmp_path, f"judge.url={url}", "judge.model=m"), groups) as judge:
        assert judge is not None and judge.settings.api_key == "secret"
    with pytest.raises(Exception, match="Connection error"):
        OpenAI(base_url=url, api_key="none", max_retries=0).models.list()


def test_a_judge_is_asked_for_the_first_rubric_that_there_is(encode, tmp_path: Path, monkeypatch) -> None:
    """Behind problems without one, and a judge without a single score is refused."""
    config = settings(tmp_path)
    groups = asked(config, encode, "writing")
    plain = asked(config, encode, "logic")[0][1][:1]
    mixed = [(group, [*plain, *examples]) for group, examples in groups]
    counts: list[int] = []

    def scores(judge: Judge, questions: list[Any]) -> list[float | None]:
        counts.append(len(questions))
        return [None] * len(questions)

    monkeypatch.setattr(Judge, "scores", scores)
    with pytest.raises(UserError, match="judge scripted scores no right answer"):
        check_judge(config, mixed, {}, noted)
    assert counts == [len(mixed)]


def test_the_scripted_judge_is_not_compared_with_itself(encode, tmp_path: Path) -> None:
    config, found = settings(tmp_path, "judge.agreement=1"), dict[str, Any]()
    check_judge(config, asked(config, encode, "writing"), found, noted)
    assert found == {} and not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def ones(tmp_path_factory) -> Path:
    """A model that scores every criterion with 1: its logits are the same everywhere, and a grammar does the rest."""
    folder, tokenizer = tmp_path_factory.mktemp("judges") / "ones", tokensieve.load_tokenizer("base")
    model = models.ours(models.config("v3", vocab_size=len(tokenizer), num_hidden_layers=1))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "o_proj" in name or "down_proj" in name:
                tensor.zero_()
            elif "embed_tokens" in name or name == "model.norm.weight":
                tensor.fill_(1.0)
        logits = torch.zeros(len(tokenizer))
        wanted = dict.fromkeys('{"scores: [', 1.0) | {",": 3.0, "1": 4.0, "}": 5.0, "]": 6.0}
        for text, logit in wanted.items():
            logits[tokenizer.encode(text, add_special_tokens=False)] = logit
        model.lm_head.weight.copy_(logits[:, None] / model.config.hidden_size)
    tokensieve.save(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_embedded_judge(ones: Path, encode, tmp_path: Path) -> None:
    """Served as long as it is asked, held to the form of its reply, measured, and never asked twice."""
    out = tmp_path / "run"
    config = settings(out, f"judge.model={ones}", 'modes=["direct"]')
    groups, found, written = asked(config, encode, "writing", "logic"), dict[str, Any](), list[dict[str, Any]]()
    before = set(psutil.Process().children(recursive=True))
    check_judge(config, groups, found, lambda: written.append(json.loads(json.dumps(found))))
    assert set(psutil.Process().children(recursive=True)) == before
    agreement = found["judge_agreement"]
    assert agreement["judge"] == str(ones) and agreement["groups"]["writing-direct"]["judge"] == [1.0] * 12
    assert agreement["all"]["agreement"]["value"] == 0 and agreement["all"]["answers"] == 12
    assert written == [{}, {}, found]  # before the server, before the measurement, and after it
    assert (out / "judge-server.log").read_text().count("/v1/chat/completions") == 13
    with Judge(JudgeSettings("http://127.0.0.1:9/v1", "m", name=str(ones)), out / "judge.sqlite") as kept:
        assert measure_agreement(kept, [group for group, _ in groups], {}) == agreement and kept.asked == 0


def test_an_embedded_judge_whose_server_ends(encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the server's log."""
    given, running = list[Any](), ExitStack()

    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"data": [{"id": "ones"}]} if path.endswith("/models") else said('{"scores": [1, 0, 0, 1, 0]}')

    @contextmanager
    def served(*arguments: Any, **how: Any) -> Iterator[str]:
        given.append((*arguments, how))
        yield running.enter_context(answering(reply))

    monkeypatch.setattr(module, "server_process", served)
    config = settings(tmp_path, "judge.model=some/ones")
    groups, log = asked(config, encode, "writing"), tmp_path / "judge-server.log"
    rubric = tuple(map(Criterion, "abcde"))
    with judging(config, groups) as judge:
        assert judge is not None and judge.settings.model == "ones" and judge.name == "some/ones"
        assert judge.scores([Question("?", "!", rubric)]) == [0.4]
        running.close()
        with pytest.raises(UserError, match=f"no reply from judge some/ones at .*; look into the log of its .*{log},"):
            judge.scores([Question("?", "!!", rubric)])
    assert given == [("some/ones", "cpu", {"options": ("--running", "8", "--pages", "512", "--no-dense"), "log": log})]


def test_a_judge_is_compared_with_the_rules_once(ones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is refused for it leaves its figures, which a run that goes on takes over."""

    class Began(Exception):
        pass

    def train(*_: Any) -> None:
        raise Began

    answers, out = list[str](), tmp_path / "run"

    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        given = json.loads(body["messages"][-1]["content"])
        answers.append(given["answer"])
        return 200, said(json.dumps({"scores": [0.5] * len(given["criteria"])}))

    def go_on(wanted: float) -> None:
        start = (f"model={ones}", 'selection="dense"', 'domains=["writing"]', 'modes=["direct"]')
        judge = (f"judge.url={url}", "judge.model=dull", f"judge.agreement={wanted}")
        pipeline.run(settings(out, *start, *judge), only="specialist-writing", console=Console(quiet=True))

    monkeypatch.setattr(Parts, "specialist", train)
    with answering(reply) as url:
        with pytest.raises(UserError, match="judge dull agrees too little with the rules: Somers' d 0.00"):
            go_on(0.5)
        figures = json.loads((out / "metrics.json").read_text())["judge_agreement"]
        assert figures["groups"].keys() == {"writing-direct"} and len(answers) == 1 + 12
        assert figures["all"]["agreement"]["value"] == 0
        (out / "judge.sqlite").unlink()  # the figures alone are enough
        with pytest.raises(Began):
            go_on(0.0)
        assert len(answers) == 13 + 1  # whether it answers is asked anew
    assert json.loads((out / "metrics.json").read_text())["judge_agreement"] == figures


def test_a_judge_that_is_no_model(encode, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The command refuses it at once; what only the server finds has a log."""
    refused = commands.refusal(commands.runner(capsys))
    words = ("judge.model: model 'gpt': no such folder", "give judge.url, of a server that has it")
    refused(words, "specialist", "--domain", "writing", "--set", "judge.model=gpt", "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    out = tmp_path / "run"
    config = settings(out, "judge.model=gpt")
    log = out / "judge-server.log"
    with pytest.raises(UserError, match=f"judge.model gpt cannot be served: model 'gpt': no such .*; see {log}, and "):
        check_judge(config, asked(config, encode, "writing"), {}, noted)
    assert "no such folder" in log.read_text()
