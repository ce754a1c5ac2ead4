"""load, save, sparsify: configs published and of transformers 5, FP8 blocks, the 671B shape, and what is refused."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV32Config, PreTrainedTokenizerFast

import tokensieve
from tests.support.checkpoints import read_folder, write_folder
from tests.support.models import INDEXER, SHAPE, YARN, config, difference, ours, pair, tokens
from tokensieve import checkpoint
from tokensieve.config import UserError
from tokensieve.families import SparseConfig, model_config
from tokensieve.model import DecoderForCausalLM, check_tokenizer, load_tokenizer, save_indexers
from tokensieve.model.rope import Rotation, softmax_factor
from tokensieve.ops import quant

K = INDEXER["index_topk"]
# Every field of the published DeepSeek-V3.2-Exp config.json, as it is written there.
PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v32",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.2",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
SMALL_PUBLISHED = PUBLISHED | SHAPE | INDEXER | {"rope_scaling": PUBLISHED["rope_scaling"] | {"factor": 16}}
SMALL_PUBLISHED |= {"rope_scaling": SMALL_PUBLISHED["rope_scaling"] | {"original_max_position_embeddings": 64}}


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def disk_tensors(model: DecoderForCausalLM, folder: Path) -> dict[str, Tensor]:
    tokensieve.save(model, folder)
    return read_folder(folder)


def with_config(folder: Path, raw: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    write_folder(folder, DeepseekV32Config(), tensors)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


# the 671B shape


def test_the_671b_model_builds_on_the_meta_device() -> None:
    built = model_config(PUBLISHED)
    assert isinstance(built, SparseConfig) and not hasattr(built, "quantization_config")
    plain = SparseConfig()
    for field in PUBLISHED.keys() & SHAPE.keys() | INDEXER.keys():
        assert getattr(built, field) == getattr(plain, field) == PUBLISHED[field], field  # the defaults are that shape
    with torch.device("meta"):
        model = DecoderForCausalLM(built)
    state = model.state_dict()
    shapes, layout = checkpoint.expected_tensors(built), checkpoint.memory_layout(built)
    assert state.keys() == layout.keys()
    for name, parts in layout.items():
        rows, columns = sum(shapes[part][0] for part in parts), shapes[parts[0]][1:]
        assert state[name].shape == ((256, rows // 256) if ".experts." in name else (rows,)) + columns, name
    assert state["model.layers.60.mlp.experts.gate_up_proj"].shape == (256, 4096, 7168)
    assert state["model.layers.3.mlp.experts.down_proj"].shape == (256, 7168, 2048)
    assert sum(x.numel() for x in state.values()) == 671_877_944_064
    assert sum(x.numel() for x in model.parameters()) == 671_877_944_064 - 58 * 256  # the router's bias is a buffer
    attention = model.model.layers[0].self_attn
    factor = softmax_factor(model.config.rope_parameters, model.config.max_position_embeddings)
    assert attention.softmax_scale(Rotation((), (), factor)) == pytest.approx(
        192**-0.5 * (0.1 * math.log(40) + 1) ** 2, rel=1e-12
    )
    assert model.top_k == 2048 and model.is_sparse
    assert all(x.is_meta for x in state.values())


# configs, published and of transformers 5


def test_published_and_transformers_5_configs_make_the_same_model(tmp_path: Path) -> None:
    raw = {k: v for k, v in SMALL_PUBLISHED.items() if k != "quantization_config"} | {"num_nextn_predict_layers": 0}
    oracle, _ = pair(config("v32", rope_parameters=YARN), tmp_path / "five", seed=2)
    five = json.loads((tmp_path / "five" / "config.json").read_text())
    assert "rope_parameters" in five and "rope_scaling" not in five
    old = with_config(tmp_path / "old", raw, read_folder(tmp_path / "five"))
    a, b = tokensieve.load(tmp_path / "five"), tokensieve.load(old)
    ids = tokens(2, 90)
    assert torch.equal(a(ids).logits, b(ids).logits)
    assert difference(a(ids).logits, oracle(ids).logits) < 1e-4
    again = tokensieve.load(save_at(b, tmp_path / "saved"))
    assert torch.equal(again(ids).logits, b(ids).logits)
    fields = {**json.loads((tmp_path / "saved" / "config.json").read_text())}
    same = raw.keys() - {"ep_size", "quantization_config", "transformers_version", "torch_dtype", "rope_theta"}
    assert {k: fields.get(k) for k in same} == {k: raw[k] for k in same}


def save_at(model: DecoderForCausalLM, folder: Path) -> Path:
    tokensieve.save(model, folder)
    return folder


def test_an_fp8_checkpoint_with_its_mtp_layer(tmp_path: Path) -> None:
    model = ours(config("v32", rope_parameters=YARN), seed=2)
    tensors = {n: x.bfloat16() for n, x in disk_tensors(model, tmp_path / "wide").items()}
    mtp = {f"model.layers.3.{n}": torch.randn(48, 96).bfloat16() for n in ("eh_proj.weight", "embed_tokens.weight")}
    stored, exact = dict(tensors), dict(tensors)
    for name, x in (tensors | mtp).items():
        if name.endswith("_proj.weight") and "weights_proj" not in name:
            stored[name], stored[f"{name}_scale_inv"] = quant.quantize_weight(x, (16, 16))
            exact[name] = quant.dequantize_weight(stored[name], stored[f"{name}_scale_inv"], (16, 16), torch.float32)
        else:
            stored[name] = x
    fp8 = SMALL_PUBLISHED["quantization_config"] | {"weight_block_size": [16, 16]}
    folder = with_config(tmp_path / "fp8", SMALL_PUBLISHED | {"quantization_config": fp8}, stored)
    raw = {k: v for k, v in SMALL_PUBLISHED.items() if k != "quantization_config"} | {"num_nextn_predict_layers": 0}
    exact = {n: x for n, x in exact.items() if n not in mtp}
    reference = tokensieve.load(with_config(tmp_path / "exact", raw, exact))
    wide = tokensieve.load(with_config(tmp_path / "bf16", raw, tensors))

    loaded = tokensieve.load(folder)
    ids = tokens(2, 90)
    assert torch.equal(loaded(ids).logits, reference(ids).logits)
    error = (loaded(ids).logits - wide(ids).logits).abs().median() / wide(ids).logits.std()
    assert 0.005 < float(error) < 0.2  # E4M3 keeps four bits; the median, as some tokens change experts
    assert len(loaded.model.layers) == 3 and sorted(loaded.extras.names) == sorted(mtp)

    tokensieve.save(loaded, tmp_path / "saved", dtype=torch.bfloat16)
    written = read_folder(tmp_path / "saved")
    assert written.keys() == tensors.keys() | mtp.keys()
    name = "model.layers.3.embed_tokens.weight"
    assert torch.equal(written[name], mtp[name])
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert type(opened).__name__ == "DeepseekV32ForCausalLM"
    assert checkpoint.read_config(tmp_path / "saved")["num_nextn_predict_layers"] == 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"index_topk": 0}, "index_topk is 0"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": -3}, "hidden_size is -3; it must be at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ({"qk_rope_head_dim": 7}, "even"),
        ({"index_dtype": "int4"}, "index_dtype"),
        ({"index_dtype": "fp8", "index_head_dim": 24}, "index_head_dim 24 must be a power of two"),
        ({"index_head_dim": 4}, "index_head_dim 4 is smaller than qk_rope_head_dim 8"),
        ({"scoring_func": "tanh"}, "scoring_func"),
        ({"scoring_func": "softmax"}, "norm_topk_prob with a softmax router"),
        ({"n_group": 3}, "8 experts cannot form 3 groups"),
        ({"topk_group": 5}, "cannot form 4 groups of which 5 are chosen"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5 of 4 experts that a token can reach"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"vocab_size": 95}, r"model.embed_tokens.weight is \(96, 48\), but config.json makes it \(95, 48\)"),
        ({"num_hidden_layers": 2}, "unknown: model.layers.2"),
        ({"num_hidden_layers": 4, "mlp_layer_types": None}, "missing: model.layers.3"),
        ({"attention_bias": True}, "missing: .*bias"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_a_config_of_another_model_is_refused_in_one_line(
    changes: dict[str, Any], complaint: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = saved_once(tmp_path_factory)
    raw = {**checkpoint.read_config(folder), **changes}
    other = tmp_path_factory.mktemp("other")
    (other / "config.json").write_text(json.dumps(raw))
    (other / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(UserError, match=complaint) as error:
        tokensieve.load(other)
    assert "\n" not in str(error.value)


def saved_once(factory: pytest.TempPathFactory) -> Path:
    folder = factory.getbasetemp() / "sparse-model"
    return folder if folder.is_dir() else save_at(ours(config("v32")), folder)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"'nowhere': no such folder, and not a bundled model"):
        tokensieve.load("nowhere")
    with pytest.raises(UserError, match=r"'\./a/b': no such folder"):
        tokensieve.load("./a/b")
    with pytest.raises(UserError, match="'someone/something': not a folder here and not to be had") as error:
        tokensieve.load("someone/something")
    assert "\n" not in str(error.value)


# save


@pytest.mark.parametrize(
    "made",
    [
        config("v2"),
        config("v3", q_lora_rank=None, tie_word_embeddings=True),
        config("v3", rope_interleave=False, attention_bias=True),
        config("v32", rope_parameters=YARN, n_shared_experts=2),
        config("v32", q_lora_rank=None, index_dtype="fp8", scoring_func="softmax", norm_topk_prob=False),
        config("v32", mlp_layer_types=["sparse", "dense", "sparse"]),
    ],
    ids=["v2", "tied", "biased", "sparse", "sparse without a latent", "mixed layers"],
)
def test_round_trip_is_bitwise(made: Any, tmp_path: Path) -> None:
    model = ours(made, seed=6)
    ids = tokens(2, 60)
    reasons = tokensieve.save(model, tmp_path / "a", shard_bytes=50_000)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    again = tokensieve.load(tmp_path / "a")
    assert torch.equal(again(ids).logits, model(ids).logits) and not again.training
    for (name, x), (other, y) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and x.dtype == y.dtype and torch.equal(x, y)
    tied = made.tie_word_embeddings
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    needs = [r for r in reasons if r.startswith("transformers")]
    assert bool(needs) == (made.model_type == "deepseek_v32" and made.q_lora_rank is None)
    if not needs:
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
        assert difference(opened(ids).logits, model(ids).logits) < 1e-4
    tokensieve.save(again, tmp_path / "a")  # onto itself
    assert torch.equal(tokensieve.load(tmp_path / "a")(ids).logits, model(ids).logits)


def test_what_others_cannot_open_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tokensieve"):
        reasons = tokensieve.save(ours(config("v32", q_lora_rank=None)), tmp_path)
    assert any("q_lora_rank is null" in r for r in reasons)
    assert [r.getMessage() for r in caplog.records] == [f"{tmp_path}: {reason}" for reason in reasons]


def test_indexers_beside_an_unchanged_trunk(tmp_path: Path) -> None:
    dense = ours(config("v3"), seed=6)
    tokensieve.save(dense, tmp_path / "base")
    sparse = tokensieve.sparsify(tokensieve.load(tmp_path / "base"), top_k=K, index_heads=32, index_dim=16)
    save_indexers(sparse, tmp_path / "sparse", "../base")
    size = sum(f.stat().st_size for f in (tmp_path / "sparse").iterdir())
    assert size < 0.5 * sum(f.stat().st_size for f in (tmp_path / "base").iterdir())
    again = tokensieve.load(tmp_path / "sparse")
    ids = tokens(2, 60)
    assert torch.equal(again(ids).logits, sparse(ids).logits)
    tokensieve.save(again, tmp_path / "whole")
    (tmp_path / "base").rename(tmp_path / "gone")
    assert torch.equal(tokensieve.load(tmp_path / "whole")(ids).logits, sparse(ids).logits)
    with pytest.raises(UserError, match=r"model.safetensors: missing though the index names it"):
        tokensieve.load(tmp_path / "sparse")


def test_transformers_own_save_and_load(tmp_path: Path) -> None:
    """What a Hugging Face trainer does with the model: the pair is bitwise, with a config given."""
    model = ours(config("v32"), seed=6)
    model.save_pretrained(tmp_path)
    again = DecoderForCausalLM.from_pretrained(tmp_path, config=model.config)
    ids = tokens(2, 60)
    assert torch.equal(again(ids).logits, model(ids).logits)
    half = DecoderForCausalLM.from_pretrained(tmp_path, config=model.config, dtype=torch.bfloat16)
    wide = {name for name, x in half.state_dict().items() if x.dtype == torch.float32}
    assert wide == {name for name in half.state_dict() if name.endswith(checkpoint.FLOAT32_SUFFIXES)}


# sparsify


@pytest.mark.parametrize(
    "made",
    [
        config("v3", rope_parameters=YARN),
        config("v3", q_lora_rank=None, attention_bias=True, tie_word_embeddings=True),
        config("v2", rope_parameters=YARN),
        config("v2", q_lora_rank=None, topk_method="greedy", n_group=None, topk_group=None),
    ],
    ids=["v3", "v3 without a latent", "v2", "v2 without a latent"],
)
def test_sparsify(made: Any, tmp_path: Path) -> None:
    dense = ours(made, seed=6)
    before = {n: x.clone() for n, x in dense.state_dict().items()}
    sparse = tokensieve.sparsify(dense, top_k=K, index_heads=32, index_dim=16, seed=3)
    assert sparse.is_sparse and not dense.is_sparse and not sparse.training and sparse.top_k == K
    c = sparse.config
    assert (c.model_type, c.index_topk, c.index_n_heads, c.index_head_dim, c.index_dtype) == (
        "deepseek_v32",
        K,
        32,
        16,
        "bf16",
    )
    assert c.scoring_func == ("softmax" if made.model_type == "deepseek_v2" else "sigmoid")
    assert c.rope_parameters == made.rope_parameters and c.q_lora_rank == made.q_lora_rank
    state = sparse.state_dict()
    for name, x in dense.state_dict().items():
        assert torch.equal(x, before[name]) and state[name].data_ptr() == x.data_ptr(), name
    added = state.keys() - before.keys()
    assert len(added) == 3 * 5 and all(".indexer." in name for name in added)
    assert all(p.requires_grad for p in sparse.parameters())

    ids = tokens(2, 60)
    assert torch.equal(sparse(ids[:, :K]).logits, dense(ids[:, :K]).logits)
    with tokensieve.selecting(sparse, "dense"):
        assert torch.equal(sparse(ids).logits, dense(ids).logits)
    assert difference(sparse(ids).logits, dense(ids).logits) > 0.05

    same, other = (tokensieve.sparsify(dense, top_k=K, index_heads=32, index_dim=16, seed=s) for s in (3, 4))
    name = "model.layers.1.self_attn.indexer.wq_b.weight"
    assert torch.equal(same(ids).logits, sparse(ids).logits)
    assert not torch.equal(other.state_dict()[name], state[name])
    assert float(state[name].std()) == pytest.approx((made.q_lora_rank or 48) ** -0.5, rel=0.05)
    norm = "model.layers.2.self_attn.indexer.k_norm"
    assert torch.equal(state[f"{norm}.weight"], torch.ones(16)) and not state[f"{norm}.bias"].any()

    tokensieve.save(sparse, tmp_path)
    again = tokensieve.load(tmp_path)
    assert torch.equal(again(ids).logits, sparse(ids).logits)
    assert all(torch.equal(x, state[n]) for n, x in again.state_dict().items())
    if made.model_type == "deepseek_v3" and made.q_lora_rank is not None:
        oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert difference(oracle(ids).logits, sparse(ids).logits) < 1e-4


def test_sparsify_in_bfloat16_and_with_the_defaults(tmp_path: Path) -> None:
    tokensieve.save(ours(config("v3")), tmp_path)
    dense = tokensieve.load(tmp_path, dtype=torch.bfloat16)
    sparse = tokensieve.sparsify(dense, index_dtype="fp8")
    c = sparse.config
    assert (c.index_topk, c.index_n_heads, c.index_head_dim, c.index_dtype) == (2048, 64, 128, "fp8")
    for name, x in sparse.state_dict().items():
        assert x.dtype == (torch.float32 if name.endswith(checkpoint.FLOAT32_SUFFIXES) else torch.bfloat16), name
    with tokensieve.selecting(sparse, "indexer", top_k=8):
        assert sparse(tokens(1, 40)).logits.isfinite().all()


def test_what_sparsify_refuses() -> None:
    dense = ours(config("v3"))
    sparse = tokensieve.sparsify(dense, top_k=8, index_heads=2, index_dim=8)
    with pytest.raises(UserError, match="already has indexers"):
        tokensieve.sparsify(sparse)
    for wrong, complaint in (
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"index_heads": -1}, "index_heads is -1"),
        ({"index_dim": 4}, "index_head_dim 4 is smaller than qk_rope_head_dim 8"),
        ({"index_dtype": "int4"}, "index_dtype"),
        ({"index_dim": 24, "index_dtype": "fp8"}, "power of two"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            tokensieve.sparsify(dense, **({"index_heads": 2, "index_dim": 8} | wrong))
        assert "\n" not in str(error.value)


# the tokenizer


def test_the_tokenizer_goes_with_the_model(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokensieve.save(ours(config("v3")), tmp_path / "a")
    with pytest.raises(UserError, match=r"a: no tokenizer.json; copy the tokenizer files"):
        load_tokenizer(tmp_path / "a")
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path / "a")
    model = tokensieve.load(tmp_path / "a")
    tokensieve.save(tokensieve.sparsify(model, index_heads=2, index_dim=8), tmp_path / "b")
    tokenizer = load_tokenizer(tmp_path / "b")
    assert len(tokenizer) == 96
    check_tokenizer(tokenizer, model.config)
    with pytest.raises(UserError, match="96 tokens but the model's vocabulary is 90"):
        check_tokenizer(tokenizer, config("v3", vocab_size=90))
    (tmp_path / "b" / "tokenizer.json").write_text("{not json")
    with pytest.raises(UserError, match="tokenizer cannot be read") as error:
        load_tokenizer(tmp_path / "b")
    assert "\n" not in str(error.value)
