"""What importing costs: the operators load torch alone, and the names of the package resolve when used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tokensieve
from tokensieve.config import UserError
from tokensieve.importing import named_object


@pytest.mark.parametrize("module", ["", ".mine"])
def test_a_module_is_named_in_full(module: str) -> None:
    with pytest.raises(UserError, match="domain d: write MODULE:NAME"):
        named_object("domain d", module, "x")


def test_an_error_inside_a_named_module_is_its_own(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "broken_inside.py").write_text("import os\nos.there_is_none\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AttributeError, match="there_is_none"):
        named_object("domain d", "broken_inside", "x")


def test_the_operators_load_without_transformers() -> None:
    code = "import sys; from tokensieve import ops; assert ops.index_topk; sys.exit('transformers' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


@pytest.mark.parametrize(
    ("set_before", "found"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "")],
)
def test_waiting_threads_spin_briefly_unless_the_user_says_otherwise(set_before, found) -> None:
    """libgomp reads it when torch is loaded, so it must stand there before."""
    code = "import sys, tokensieve, os; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT', ''))"
    rest = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    root = Path(__file__).resolve().parents[1]
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=rest | set_before, stdout=subprocess.PIPE, text=True
    )
    assert shown.stdout.split(" ") == ["False", f"{found}\n"]


def test_every_public_name_resolves() -> None:
    for name in tokensieve.__all__:
        assert getattr(tokensieve, name) is not None
    assert set(tokensieve.__all__) <= set(dir(tokensieve))
    with pytest.raises(AttributeError, match="no attribute 'sparsifie'"):
        _ = tokensieve.sparsifie


ORDERS = (
    "import tokensieve; from transformers import AutoModelForCausalLM as A",
    "import tokensieve; from transformers import DeepseekV2Config; from transformers import AutoModelForCausalLM as A",
    "from transformers import AutoModelForCausalLM as A; import tokensieve",
    "from transformers import LlamaConfig; import tokensieve; from transformers import AutoModelForCausalLM as A",
)


@pytest.mark.parametrize("order", ORDERS)
def test_the_auto_classes_know_our_families_in_whatever_order_things_load(order: str) -> None:
    """transformers loads its Auto classes while it loads a model's config, for the sake of a docstring."""
    code = f"{order}; from transformers import AutoConfig; c = AutoConfig.for_model('llama_dsa'); "
    code += "print(type(c).__module__, type(c) in A._model_mapping)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[1], capture_output=True)
    assert shown.stdout.decode().split() == ["tokensieve.families.grouped", "True"], shown.stderr.decode()
