"""Adapters, hooks and quantized layers act in every form of attention, or are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn as nn
from torch import Tensor
from transformers import LlamaConfig

import tokensieve
from tests.support.models import config, difference, ours, randomize, tokens
from tokensieve.config import UserError
from tokensieve.engine.runner import Runner
from tokensieve.model import DecoderForCausalLM, ForwardOptions, LatentCache, save_indexers, with_options
from tokensieve.model.linear import effective_weight

K, LENGTH = 24, 70  # the tiny model's k, and a prompt that leaves keys out
TOLERANCE = 1e-4  # of logits of about 4, float32: the adapter's product is summed apart, or merged into the weight
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::FutureWarning")


def base_model(family: str) -> DecoderForCausalLM:
    if family == "latent":
        return ours(config("v32"), seed=1)
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "attention_bias": True}
    return randomize(tokensieve.sparsify(ours(LlamaConfig(**sizes, **heads)), K, 32, 16), 1)


def adapted(target: Any, family: str = "latent", **settings: Any) -> tuple[DecoderForCausalLM, Any]:
    """The base model, and a LoRA of drawn weights around it."""
    torch.manual_seed(0)
    base = base_model(family)
    lora = peft.LoraConfig(target_modules=target, init_lora_weights=False, r=4, **settings)
    return base, peft.get_peft_model(base, lora).eval()


def every_way(model: DecoderForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """The last token's logits: in both forms, step by step, and from the engine's pages."""
    ways = {}
    for form in ("masked", "gathered"):
        with with_options(model, ForwardOptions(form=form)):
            ways[form] = model(ids).logits[0, -1]
    cache = LatentCache()
    model(ids[:, :-1], past_key_values=cache, use_cache=True)
    ways["step"] = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits[0, -1]
    runner, row = Runner(model, 4), ids[0].tolist()
    runner.chunk(row[:64], 0, [0, 1], "indexer")
    ways["chunk"] = runner.chunk(row[64:], 64, [0, 1], "indexer").clone()
    runner.chunk(row[64:-1], 64, [0, 1], "indexer")
    ways["pages"] = runner.step([row[-1]], [len(row)], [[0, 1]], "indexer")[0].clone()
    return ways


INDEXER = ["wq_b", "wk", "weights_proj"]
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
CASES = [
    ("latent", ["kv_b_proj"], {}),
    ("latent", ["weights_proj"], {}),
    ("latent", ["q_b_proj", "wq_b", "o_proj"], {}),
    ("latent", "all-linear", {}),  # which PEFT takes to hold router and experts too
    ("latent", [], EXPERTS),
    ("latent", ["kv_b_proj", "q_a_proj", *INDEXER], {"use_dora": True}),
    ("latent", ["kv_b_proj", *INDEXER], {"use_rslora": True}),
    ("grouped", INDEXER, {}),
    ("grouped", ["q_proj", "k_proj", "v_proj"], {"use_dora": True}),
    ("grouped", "all-linear", {}),
]


@pytest.mark.parametrize(("family", "target", "settings"), CASES)
@torch.no_grad()
def test_an_adapter_acts_in_every_form_as_merged(family: str, target: Any, settings: dict[str, Any]) -> None:
    base, lora = adapted(target, family, **settings)
    ids = tokens(1, LENGTH)
    with lora.disable_adapter():
        without = base(ids).logits[0, -1]
    acting = every_way(base, ids)
    merged = every_way(lora.merge_and_unload(), ids)
    for way, logits in acting.items():
        assert difference(logits, merged[way]) < TOLERANCE, way
        assert difference(logits, without) > 0.1, way


@pytest.mark.parametrize("objective", ["warmup", "adapt"])
def test_adapters_learn(objective: Any) -> None:
    """In adaptation the trunk's adapter, in warm-up the indexer's, beyond k tokens."""
    base, lora = adapted(["kv_b_proj", "weights_proj"])
    with tokensieve.training(lora, objective):
        lora.train()(input_ids=tokens(1, LENGTH), labels=tokens(1, LENGTH)).loss.backward()
        learned = {n for n, p in base.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}
    adapters = {n for n, _ in base.named_parameters() if "lora_" in n}
    wanted = {n for n in adapters if ".indexer." in n} if objective == "warmup" else adapters
    assert wanted and learned & adapters == wanted
    assert not any("kv_b_proj.base_layer" in n for n in learned)


def hooked(change: Callable[[Tensor], Tensor | None]) -> DecoderForCausalLM:
    model = ours(config("v32"), seed=1)
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj.register_forward_hook(lambda _, args, out: change(out))
    return model


@torch.no_grad()
def test_a_hook_acts_in_every_form() -> None:
    ids, plain = tokens(1, LENGTH), ours(config("v32"), seed=1)
    doubled = every_way(hooked(lambda out: 2.0 * out), ids)
    for layer in plain.model.layers:
        layer.self_attn.kv_b_proj.weight.mul_(2.0)
    for way, logits in every_way(plain, ids).items():
        assert difference(doubled[way], logits) < TOLERANCE, way
    watched: list[tuple[int, ...]] = []
    watching = every_way(hooked(lambda out: watched.append(tuple(out.shape))), ids)
    assert watched and difference(watching["pages"], every_way(ours(config("v32"), seed=1), ids)["pages"]) < TOLERANCE


@pytest.mark.parametrize("family", ["latent", "grouped"])
@torch.no_grad()
def test_hooks_on_every_linear_layer_act_in_every_form(family: str) -> None:
    """Each hook scales its layer's outputs one by one, so that no norm behind it undoes that."""
    hooked, plain, ids = base_model(family), base_model(family), tokens(1, LENGTH)
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: 0.5 + torch.rand(module.out_features, generator=generator)
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert len(factors) > 20 and any("indexer.wk" in name for name in factors)
    for name, factor in factors.items():
        hooked.get_submodule(name).register_forward_hook(lambda _, args, out, factor=factor: out * factor)
    acting = every_way(hooked, ids)
    whole = every_way(changed(plain, factors), ids)
    for way, logits in acting.items():
        assert difference(logits, whole[way]) < TOLERANCE, way
    for name, factor in factors.items():  # a hook that did not act would be seen: every factor matters
        without = changed(plain, {name: 1 / factor})(ids).logits[0, -1]
        assert difference(without, whole["masked"]) > 10 * TOLERANCE, name
        changed(plain, {name: factor})


def changed(model: DecoderForCausalLM, factors: dict[str, Tensor]) -> DecoderForCausalLM:
    for name, factor in factors.items():
        layer = model.get_submodule(name)
        layer.weight.mul_(factor[:, None])
        if layer.bias is not None:
            layer.bias.mul_(factor)
    return model


@torch.no_grad()
def test_what_is_not_linear_is_refused() -> None:
    ids = tokens(1, LENGTH)
    _, dropping = adapted(["kv_b_proj"], lora_dropout=0.5)
    for model in (hooked(lambda out: out.clamp(-0.1, 0.1)), hooked(lambda out: out + 1.0), dropping.train()):
        with (
            pytest.raises(UserError, match="kv_b_proj is .* not linear"),
            with_options(model, ForwardOptions(form="gathered")),
        ):
            model(input_ids=ids)


@torch.no_grad()
def test_what_is_not_linear_is_refused_in_half_precision() -> None:
    """Small deviations too, whatever rounding hides; an adapter that is zero still drops out later."""
    width, outputs = 512, 1024
    torch.manual_seed(0)
    like = torch.zeros(1, width, dtype=torch.bfloat16)

    def layer(bias: bool = False) -> nn.Linear:
        return nn.Linear(width, outputs, bias=bias, dtype=torch.bfloat16)

    def with_lora(**settings: Any) -> Any:
        holder = nn.Sequential(layer())
        return peft.get_peft_model(holder, peft.LoraConfig(target_modules=["0"], **settings)).base_model.model[0]

    adding = layer()
    adding.register_forward_hook(lambda _, args, out: out + 0.05)
    biased = layer(bias=True)
    biased.bias.fill_(0.03)
    for bad in (adding, biased, with_lora(lora_dropout=0.1).train()):
        with pytest.raises(UserError, match="x is .* not linear"):
            effective_weight(bad, "x", like)
    good = with_lora(lora_dropout=0.1, init_lora_weights=False).eval()
    delta = good.get_delta_weight("default")
    assert difference(effective_weight(good, "x", like), good.base_layer.weight + delta) < 4e-3  # bf16 of up to 0.2


class Halves(nn.Module):
    """A layer whose numbers are int8 with a scale per row, as quantizers make them: no `weight`, or an int8 one."""

    def __init__(self, layer: nn.Linear, shows: bool = False):
        super().__init__()
        self.in_features = layer.in_features
        scale = layer.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("numbers", (layer.weight / scale).round().to(torch.int8))
        if shows:
            self.weight = self.numbers

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.numbers.float() * self.scale).T


@torch.no_grad()
def test_a_quantized_layer_acts_in_every_form() -> None:
    model, plain = ours(config("v32"), seed=1), ours(config("v32"), seed=1)
    for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
        for place, name, shows in (("", "kv_b_proj", False), ("indexer", "weights_proj", True)):
            there, here = (x.self_attn.get_submodule(place) for x in (layer, other))
            quantized = Halves(getattr(there, name), shows)
            getattr(here, name).weight.copy_(quantized.numbers.float() * quantized.scale)
            setattr(there, name, quantized)
    ids = tokens(1, LENGTH)
    expected = every_way(plain, ids)
    for way, logits in every_way(model, ids).items():
        assert difference(logits, expected[way]) < TOLERANCE, way


def test_a_plain_layer_gives_its_own_weight() -> None:
    layer = nn.Linear(6, 5, bias=False)
    assert effective_weight(layer, "x", torch.zeros(1, 6)) is layer.weight
    with pytest.raises(UserError, match="x is Linear and not linear"):
        effective_weight(nn.Linear(6, 5), "x", torch.zeros(1, 6))


def test_a_model_with_adapters_is_not_saved(tmp_path: Path) -> None:
    base, lora = adapted(["kv_b_proj"])
    for model in (base, lora):
        with pytest.raises(UserError, match=r"holds adapters .*merge_and_unload"):
            tokensieve.save(model, tmp_path / "out")
    with pytest.raises(UserError, match=r"holds adapters"):
        save_indexers(base, tmp_path / "out", "trunk")
    assert not list(tmp_path.iterdir())
    tokensieve.save(lora.merge_and_unload(), tmp_path / "out")
    again = tokensieve.load(tmp_path / "out")
    assert difference(again(tokens(1, 40)).logits, base(tokens(1, 40)).logits) < TOLERANCE
