"""The same weights give the same logits and gradients in `transformers`."""

import json

import pytest
import torch

from stepline.models.config import ModelConfig
from stepline.models.hf import (
    config_from_hf,
    from_hf_name,
    from_hf_state,
    hf_config_dict,
    to_hf_name,
    to_hf_state,
)
from stepline.models.init import init_model
from stepline.models.transformer import Transformer

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 4,
    "ffn_size": 112,
    "init_std": 0.15,
}
LLAMA3 = {"original_context": 24, "factor": 4}
SHAPES = {
    "mha": ModelConfig(**SMALL),
    "gqa": ModelConfig(**SMALL, num_kv_heads=2, rope_theta=500_000.0),
    "tied, wide heads": ModelConfig(**SMALL, num_kv_heads=1, head_dim=32, tied_embeddings=True),
    "linear scaling": ModelConfig(**SMALL, rope_scaling={"type": "linear", "factor": 3}),
    "llama3 scaling": ModelConfig(**SMALL, num_kv_heads=2, rope_scaling=LLAMA3),
    "qwen3": ModelConfig(**SMALL, num_kv_heads=2, head_dim=24, qk_norm=True, norm_eps=1e-6),
}


def pair(config):
    """Our model and theirs with the same weights; norm weights differ from 1."""
    import transformers

    ours = Transformer(config)
    init_model(ours, config, seed=0)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if "norm" in name:
                p.copy_(torch.linspace(0.5, 1.5, p.numel()))
    shape = hf_config_dict(config, max_positions=256)
    theirs = getattr(transformers, shape["architectures"][0])(transformers.AutoConfig.for_model(**shape))
    result = theirs.load_state_dict(to_hf_state(ours.state_dict()), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == (["lm_head.weight"] if config.tied_embeddings else [])
    return ours, theirs.eval()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_equal_stock_mixtures(tmp_path, family):
    """Through files, as transformers fuses the experts' matrices when it loads them."""
    import transformers
    from safetensors.torch import load_file, save_file

    shape = SMALL | {
        "num_kv_heads": 2,
        "head_dim": 24,
        "qk_norm": family == "qwen3_moe",
        "ffn": "moe",
        "ffn_size": 40,
        "moe": {"experts": 6, "top_k": 2, "balance": "none"},
    }
    config = ModelConfig(**shape)
    ours = Transformer(config)
    init_model(ours, config, seed=0)
    state = to_hf_state(ours.state_dict(), family)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hf_config_dict(config, max_positions=256)))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert theirs.config.model_type == family
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = torch.randint(0, 97, (2, 60), generator=torch.Generator().manual_seed(1))
    logits, expected = ours(tokens), theirs.eval()(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)

    back = from_hf_state(load_file(tmp_path / "model.safetensors"), config)
    weights = dict(ours.named_parameters())
    assert back.keys() == weights.keys()
    assert all(torch.equal(weights[name], value) for name, value in back.items())


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_config_round_trip(config):
    back, positions = config_from_hf(hf_config_dict(config, max_positions=256))
    explicit = {"num_kv_heads": config.kv_heads, "head_dim": config.dim_per_head, "init_std": None}
    if config.rope_scaling is not None and config.rope_scaling.type == "linear":
        explicit["rope_scaling"] = back.rope_scaling  # of llama3's values none is kept
    assert back == config.model_copy(update=explicit)
    assert positions == 256


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "'yarn'.*linear, llama3"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_what_stepline_does_not_compute_is_named(changed, named):
    raw = hf_config_dict(SHAPES["mha"], max_positions=256) | changed
    with pytest.raises(ValueError, match=named):
        config_from_hf(raw)


@pytest.mark.parametrize(
    "changed",
    [
        {"qk_norm": False, "moe": {"renormalise": False}},
        {"moe": {"shared_size": 8}},
        {"moe": {"score": "sigmoid"}},
        {"blocks": "revffn"},
    ],
)
def test_what_no_stock_architecture_computes_is_refused(changed):
    shape = SMALL | {"qk_norm": True, "ffn": "moe"} | changed
    with pytest.raises(ValueError, match="stock"):
        hf_config_dict(ModelConfig(**shape), max_positions=256)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_logits_and_gradients_equal_transformers(config):
    ours, theirs = pair(config)
    tokens = torch.randint(0, 97, (2, 120), generator=torch.Generator().manual_seed(1))
    logits = ours(tokens)
    expected = theirs(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)

    labels = tokens.clone()
    labels[0, 60:] = -100
    theirs(tokens, labels=labels).loss.backward()
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    nll, _ = ours(tokens, targets)
    (nll / (targets != -100).sum()).backward()
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        expected = gradients[to_hf_name(name)].grad
        assert (p.grad - expected).norm() < 1e-5 * expected.norm() + 1e-8, name


def test_names_round_trip():
    ours, theirs = pair(SHAPES["qwen3"])
    assert set(map(to_hf_name, ours.state_dict())) == set(theirs.state_dict())
    assert [from_hf_name(to_hf_name(name)) for name in ours.state_dict()] == list(ours.state_dict())


def test_from_hf_state_leaves_out_a_tied_head():
    config = SHAPES["tied, wide heads"]
    ours, theirs = pair(config)
    assert "lm_head.weight" in theirs.state_dict()
    state = from_hf_state(theirs.state_dict(), config)
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in ours.state_dict().items())
