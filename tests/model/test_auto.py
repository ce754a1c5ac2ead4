"""transformers' Auto classes after `import tokensieve`, whichever of the two a program imports first."""

import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

import tokensieve
from tests.support.grouped import DENSE, config
from tests.support.models import ours
from tokensieve.config import UserError
from tokensieve.families import FAMILIES
from tokensieve.model import DecoderForCausalLM, auto

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys, tokensieve
assert "torch" not in sys.modules and "transformers" not in sys.modules
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])))
"""


def test_a_sparse_folder_opens_in_our_class(tmp_path: Path) -> None:
    tokensieve.save(ours(config("qwen2_dsa", num_hidden_layers=1)), tmp_path)
    ended = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == f"{DecoderForCausalLM}\n", ended.stderr


def test_after_transformers_the_model_is_loaded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(importlib, "import_module", loaded.append)
    finders = list(sys.meta_path)
    runpy.run_path(tokensieve.__file__)
    assert loaded == ["tokensieve.model"] and sys.meta_path == finders


def test_families_that_transformers_has_stay_its_own() -> None:
    auto.register()
    for kind in DENSE:
        assert CONFIG_MAPPING[kind].__module__.startswith("transformers.")
        assert MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]].__module__.startswith("transformers.")
        assert MODEL_FOR_CAUSAL_LM_MAPPING[FAMILIES[f"{kind}_dsa"].config] is DecoderForCausalLM
    assert MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING["deepseek_v32"]] is not DecoderForCausalLM


def test_an_adapter_beside_the_model_is_refused(tmp_path: Path) -> None:
    """AutoModelForCausalLM hands it over if PEFT is installed, and no adapter would be loaded."""
    tokensieve.save(ours(config("qwen2_dsa", num_hidden_layers=1)), tmp_path)
    DecoderForCausalLM.from_pretrained(tmp_path, adapter_kwargs={"revision": None}, _from_auto=True)
    with pytest.raises(UserError, match="adapter_kwargs="):
        DecoderForCausalLM.from_pretrained(tmp_path, adapter_kwargs={"_adapter_model_path": tmp_path})
