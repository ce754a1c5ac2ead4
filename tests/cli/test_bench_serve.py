"""`tokensieve bench serve`: many requests at once on a checkpoint, and on random weights of a published shape."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tokensieve
from tests.families.test_grouped import PUBLISHED as PUBLISHED_MODELS
from tests.support import commands
from tests.support.models import config, ours
from tokensieve.bench import Workload, random_model, random_prompts, serve_load
from tokensieve.bench.load import fill_with_noise
from tokensieve.cli import bench
from tokensieve.cli.pricing import config_of
from tokensieve.config import UserError
from tokensieve.cost import parameters, shape_of
from tokensieve.engine import Engine, EngineConfig
from tokensieve.engine.runner import Runner
from tokensieve.families import FAMILIES
from tokensieve.model import DecoderForCausalLM

INDEXER = ("index_n_heads", "index_head_dim", "index_rope_head_dim", "index_topk", "index_dtype", "indexer_types")
SMALL = {
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "hidden_size": 64, "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 4096, "q_lora_rank": 32, "kv_lora_rank": 32,
    "index_n_heads": 4,
    "index_head_dim": 64, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
}  # fmt: skip


def changes(shape: str = "deepseek_v32") -> list[str]:
    known = FAMILIES[shape].config()
    return [part for key, value in SMALL.items() if hasattr(known, key) for part in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def model() -> Any:
    return ours(config("v32", vocab_size=4096), seed=1)


def test_a_checkpoint_is_measured(tmp_path: Path, capsys) -> None:
    run = commands.runner(capsys)
    ended = run(
        "bench",
        "serve",
        "base",
        "--requests",
        "1,3",
        "--prompt",
        "70",
        "--new",
        "4",
        "--selection",
        "dense",
        "--out",
        str(tmp_path),
    )
    assert ended.status == 0, ended
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert [row["requests"] for row in rows] == [1, 3] and rows[1]["pages"] == 6
    assert all(0 < row["first_p50"] <= row["first_p99"] <= row["seconds"] for row in rows)
    assert all(row["prompt_tokens_per_second"] > row["tokens_per_second"] > 0 for row in rows)


@pytest.mark.parametrize("top_k", [(16,), pytest.param((16, 64), marks=pytest.mark.slow)])
def test_a_shape_is_swept(top_k: tuple[int, ...], tmp_path: Path, capsys) -> None:
    sizes = [
        "--experts",
        "8,16",
        "--top-k",
        ",".join(map(str, top_k)),
        "--selection",
        "indexer,dense",
        "--requests",
        "2",
        "--prompt",
        "90,70",
    ]
    shape = ["--shape", "deepseek_v32", *changes(), "--new", "3", "--filled"]
    ended = commands.runner(capsys)("bench", "serve", *shape, *sizes, "--out", str(tmp_path))
    assert ended.status == 0, ended
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    found = [(row["experts"], row["top_k"], row["prompt"], row["selection"]) for row in rows]
    assert found == list(itertools.product((8, 16), top_k, (90, 70), ("indexer", "dense")))
    assert all(row["prompt_tokens_per_second"] == 0 and row["next_p99"] >= row["next_p50"] > 0 for row in rows)


def test_what_is_filled_is_decoded_at_its_length(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests begin in the same step, on a cache of noise as long as their prompts."""
    seen, plain = [], Runner.step

    def step(self, tokens, lens, *rest):
        seen.append(list(lens))
        return plain(self, tokens, lens, *rest)

    monkeypatch.setattr(Runner, "step", step)
    prompts = random_prompts(40, 100, 4096)
    found = serve_load(model, tokensieve.load_tokenizer("base"), Workload(40, 100, 4, filled=True), prompts)
    assert seen == [[101] * 40, [102] * 40, [103] * 40]
    assert found.pages == 80 and found.tokens_per_second > 0


def test_the_end_of_a_filled_prompt_is_run(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """`last` tokens of it, in chunks that end where the engine's do."""
    seen, plain = [], Runner.chunk

    def chunk(self, tokens, past, *rest, **options):
        seen.append((past, len(tokens)))
        return plain(self, tokens, past, *rest, **options)

    monkeypatch.setattr(Runner, "chunk", chunk)
    load = Workload(2, 320, 3, filled=True, chunk=128, last=128)
    found = serve_load(model, tokensieve.load_tokenizer("base"), load, random_prompts(2, 320, 4096))
    assert seen == [(192, 64)] * 2 + [(256, 64)] * 2
    assert found.prompt_tokens_per_second == pytest.approx(2 * 128 / found.first_p99)
    assert found.next_p99_over_p50 == pytest.approx(found.next_p99 / found.next_p50)


def test_noise_is_in_every_place(model) -> None:
    engine = Engine(model, tokensieve.load_tokenizer("base"), EngineConfig(pages=3))
    fill_with_noise(engine)
    for pages in (*engine.runner.pools.entries, *engine.runner.pools.index):
        assert (pages != 0).any(-1).all() and 0.9 < float(pages.float().std()) < 1.1


def test_random_weights_are_drawn_and_norms_are_one() -> None:
    model = random_model(config("v32"), "cpu", torch.bfloat16)
    for name, x in model.state_dict().items():
        wide = name.endswith(("weights_proj.weight", "e_score_correction_bias"))
        assert x.dtype == (torch.float32 if wide else torch.bfloat16), name
        if "norm" in name:
            assert bool((x == (0 if name.endswith("bias") else 1)).all()), name
        elif not name.endswith("bias"):
            assert 0.015 < float(x.float().std()) < 0.025, name


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["base"], "base is dense and selects nothing"),
        (["base", "--selection", "dense,window"], "--selection window: base is dense"),
        (["--shape", "deepseek_v3", *changes("deepseek_v3")], "--selection indexer: deepseek_v3 is dense"),
        (["nowhere", "--requests", ","], "--requests ,: give whole numbers"),
        (["nowhere", "--prompt", ""], "--prompt : give whole numbers"),
        (["nowhere", "--top-k", "k"], "--top-k: k is no whole number; give whole numbers"),
        (["sparse", "--requests", "0"], "--requests 0"),
        (["sparse", "--prompt", "a"], "--prompt: a is no whole number"),
        (["sparse", "--selection", "best"], "'best' is unknown; use one of indexer, window"),
        (["sparse", "--experts", "4"], "give --shape"),
        (["--shape", "deepseek"], "--shape deepseek is unknown"),
        (["--shape", "deepseek_v32", "--set", "layers=3"], "--set layers=3"),
        (
            ["--shape", "deepseek_v32", "--set", "num_hidden_layers=" + "[" * 10**5],
            "num_hidden_layers: nested too deeply",
        ),
        (["sparse", "--prompt", "40000"], "past the model's"),
        (["sparse", "--last", "64"], "--last 64: without --filled whole prompts are run; give --filled too"),
        (["sparse", "--filled", "--last", "64", "--prompt", "128,32"], "--last 64: a prompt has 32 tokens"),
    ],
)
def test_bad_input(options: list[str], says: str, capsys) -> None:
    ended = commands.runner(capsys)("bench", "serve", *options)
    assert ended.status == 2 and says in str(ended)


@pytest.mark.parametrize("model", PUBLISHED_MODELS)
def test_shapes_are_those_of_published_models(model: str) -> None:
    raw, total, _ = PUBLISHED_MODELS[model]
    shape = raw["model_type"]
    assert parameters(shape_of(bench._config(shape, [], None))).total == total
    assert parameters(shape_of(config_of(shape)[0])).total == total  # what `cost` and `plan` take by this name
    sparse, dense = (bench._config(name, ["num_hidden_layers=2"], None) for name in (f"{shape}_dsa", shape))
    with torch.device("meta"):
        made = tokensieve.sparsify(DecoderForCausalLM(dense), index_heads=16).config
    for name in INDEXER:
        assert getattr(sparse, name) == getattr(made, name), name
    assert shape_of(sparse) == shape_of(made)


def test_grouped_queries_are_measured(tmp_path: Path, capsys) -> None:
    small = {name: SMALL[name] for name in ("hidden_size", "intermediate_size", "vocab_size")}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    sets = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    rest = ["--filled", "--last", "64", "--requests", "2", "--prompt", "128", "--new", "3", "--top-k", "16"]
    ended = commands.runner(capsys)(
        "bench", "serve", "--shape", "qwen3_dsa", *sets, *rest, "--selection", "indexer,dense", "--out", str(tmp_path)
    )
    assert ended.status == 0 and "p99/p50" in ended.out and "peak" in ended.out, ended
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert [row["selection"] for row in rows] == ["indexer", "dense"]
    assert all(row["next_p99_over_p50"] >= 1 and row["memory_bytes"] > 0 for row in rows)
    assert all(row["prompt_tokens_per_second"] > 0 and row["last"] == 64 for row in rows)


def test_experts_are_set_under_each_familys_own_name() -> None:
    for shape in ("deepseek_v32", "qwen3_moe", "qwen3_moe_dsa"):
        assert shape_of(bench._config(shape, ["num_hidden_layers=4"], 16)).experts == 16
    with pytest.raises(UserError, match="--experts 16: a model of type llama has no experts"):
        bench._config("llama", [], 16)
