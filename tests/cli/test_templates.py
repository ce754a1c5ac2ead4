"""Chat templates that fail, and the tokens that end an answer, in `generate`."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import tokensieve
from tokensieve.cli import terminal, text
from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Request, Sampling
from tokensieve.model.files import model_path

BROKEN = {
    "{{ raise_exception('no roles\nbut users') }}": r"refuses these messages: no roles but users$",
    "{% if %}": r"is no valid template \(.*line 1\); correct chat_template.jinja$",
    "{{ messages[0].nothing.at_all }}": "refuses these messages",
    "{{ 1 // 0 }}": "refuses these messages",
}


@pytest.mark.parametrize("template", BROKEN)
def test_a_template_that_fails_ends_in_one_line(template: str) -> None:
    tokenizer = tokensieve.load_tokenizer("sparse")
    tokenizer.chat_template = template
    for asked in (
        lambda: text._prompt_ids(tokenizer, "Hello", as_chat=True),
        lambda: terminal.prompt_of(tokenizer, [{"role": "user", "content": "Hello"}]),
    ):
        with pytest.raises(UserError, match=BROKEN[template]) as refused:
            asked()
        assert "\n" not in str(refused.value)


def test_end_tokens_of_the_checkpoints_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`generate` and the engine stop at the end tokens of config.json and of generation_config.json."""
    folder, tokenizer = tmp_path / "base", tokensieve.load_tokenizer("base")
    shutil.copytree(model_path("base"), folder)
    ids = [0, 100, 200]
    with torch.inference_mode():
        free = tokensieve.load(folder).generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    assert tokenizer.eos_token_id not in free and len(free) == 6
    end = next(token for token in free[1:] if token != free[0])
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        old = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(old | {"eos_token_id": [1, end]}))
        model = tokensieve.load(folder)
        assert model.end_tokens(tokenizer) == {1, end}
        text._write(model, tokenizer, ids, 6, None, 0.0, 0)
        written = capsys.readouterr().out
        engine = Engine(model, tokenizer, EngineConfig(pages=4))
        engine.add(Request("a", tuple(ids), Sampling(max_tokens=6)))
        outputs = [output for _ in range(6) if engine.busy for output in engine.step()]
        assert outputs[-1].finish == "stop" and outputs[-1].completion_tokens == free.index(end) + 1
        assert written.strip() == tokenizer.decode(free[: free.index(end)]).strip()
        file.write_text(json.dumps(old))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "one"}))
    with pytest.raises(UserError, match="eos_token_id is 'one'"):
        tokensieve.load(folder)
