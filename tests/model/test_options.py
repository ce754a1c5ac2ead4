"""Options that users of transformers pass: honoured, or refused in one line; never ignored, never a TypeError."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tokensieve
from tests.support.models import config, ours, tokens
from tokensieve.config import UserError
from tokensieve.model import DecoderForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("options") / "model"
    tokensieve.save(ours(config("v32")), place)
    return place


def test_from_pretrained_takes_what_trainers_pass(folder: Path) -> None:
    """The options of TRL's `model_init_kwargs`, and of examples for transformers."""
    model = DecoderForCausalLM.from_pretrained(
        folder,
        attn_implementation="sdpa",
        trust_remote_code=True,
        revision="main",
        quantization_config=None,
        use_cache=False,
        torch_dtype="bfloat16",
        device_map={"": "cpu"},
    )
    assert model.dtype == torch.bfloat16 and model.config.use_cache is False and model.device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation='flash_attention_2' is not supported"),
        ({"load_in_8bit": True}, "load_in_8bit=True is not supported; leave it out"),
        ({"revision": "v2"}, "revision='v2' is not supported"),
        ({"device_map": {"model.embed_tokens": 0, "lm_head": 1}}, "a model lies on one device"),
        ({"device_map": "balanced"}, "device_map 'balanced'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_from_pretrained_refuses_the_rest(folder: Path, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        DecoderForCausalLM.from_pretrained(folder, **options)
    assert "\n" not in str(error.value)


def test_load_and_sparsify_name_their_options(folder: Path) -> None:
    with pytest.raises(UserError, match="load has no option device_map; use device"):
        tokensieve.load(folder, device_map="auto")
    with pytest.raises(UserError, match="load has no option attn_implementation; its options are dtype, device"):
        tokensieve.load(folder, attn_implementation="sdpa")
    with pytest.raises(UserError, match="load takes a dtype of torch, not 'bfloat16'; use for instance torch.bfloat16"):
        tokensieve.load(folder, "bfloat16")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"sparsify takes a model of tokensieve, not str; load it first"):
        tokensieve.sparsify("base", 64)  # type: ignore[arg-type]


@torch.no_grad()
def test_attention_weights_are_refused(folder: Path) -> None:
    model, ids = tokensieve.load(folder), tokens(1, 12)
    with pytest.raises(UserError, match="output_attentions is not supported"):
        model(ids, output_attentions=True)
    with pytest.raises(UserError, match="output_attentions is not supported"):
        model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, output_attentions=True)
    states = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, output_hidden_states=True)
    assert len(states.hidden_states) == 2 and len(states.hidden_states[0]) == 4
    with pytest.raises(UserError, match="output_attentions is not supported"):
        ours(config("v32", output_attentions=True))(ids)
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 4


@torch.no_grad()
def test_logits_of_the_routers_are_refused(folder: Path) -> None:
    """A trainer that asks for them would compute a balance loss."""
    model, ids = tokensieve.load(folder), tokens(1, 12)
    for part in (model, model.model):
        with pytest.raises(UserError, match="output_router_logits is not supported, .* router_aux_loss_coef to 0"):
            part(ids, output_router_logits=True)
        part(ids, output_router_logits=False)


@torch.no_grad()
def test_another_cache_is_refused(folder: Path) -> None:
    model, ids = tokensieve.load(folder), tokens(1, 12)
    with pytest.raises(UserError, match="cache_implementation 'static' is not supported"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    same = model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="dynamic")
    assert torch.equal(plain, same)
