"""Reversible blocks with a mixture inside: backward against stored activations, bit by bit, the counts of loads too."""

import contextlib
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stepline.kernels.grouped import grouped_mm_linear, loop_linear
from stepline.models.config import ModelConfig
from stepline.models.init import init_parameter
from stepline.models.moe import MoE

reversible = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "reversible_models.py")))
EXPERTS, TOP_K, MOES = reversible.EXPERTS, reversible.TOP_K, reversible.MOES
COMPUTE = ("fp32", "bf16")
tokens = reversible.tokens


@torch.no_grad()
def build(moe, layers=4, compute="fp32"):
    config = ModelConfig(
        vocab_size=reversible.VOCAB, hidden_size=32, num_layers=layers, num_heads=2, num_kv_heads=1, ffn_size=8,
        init_std=0.2, blocks="revffn", **reversible.mixture(moe),
    )  # fmt: skip
    model = reversible.Model(config)
    for name, p in model.named_parameters():  # buffers stay in fp32
        p.data = init_parameter(name, p.shape, config, seed=0).to(reversible.DTYPES[compute])
    if moe == "bias":
        reversible.tilt(model)
    return model


def forward(model, *batches, stored=False):
    """Loss, with all counts at zero before."""
    model.zero_grad()
    for layer in model.layers:
        layer.ffn.load.zero_()
        layer.ffn.sums.zero_()
    scale = torch.tensor(0.1)
    sums = [model(b, reversible.targets_of(b), loss_scale=scale, stored=stored) for b in batches]
    return sum(one.nll for one in sums) * scale


def taken(model):
    """Gradients, and buffers: loads, sums, biases."""
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    return found | {f"buffer {name}": b.clone() for name, b in model.named_buffers()}


def trained(model, *batches, stored=False):
    forward(model, *batches, stored=stored).backward()
    return taken(model)


def total_load(found):
    return sum(int(t.sum()) for name, t in found.items() if name.endswith(".load"))


@pytest.fixture
def inverted():
    """(own, other) that backward found, by half, last half first."""
    with reversible.inversions() as found:
        yield found


@pytest.mark.parametrize("moe", MOES)
@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("layers", [4, 48])
def test_on_a_grid_gradients_states_and_counts_are_bit_equal(layers, compute, moe, inverted, assert_equal):
    model = build(moe, layers, compute)
    seen = reversible.read_streams(model)
    expected = trained(model, tokens(), stored=True)
    assert not inverted
    assert total_load(expected) == layers * TOP_K * 17  # of the 20 tokens
    assert all(g.isfinite().all() and g.abs().sum() > 0 for n, g in expected.items() if "buffer" not in n)
    assert_equal(trained(model, tokens()), expected)
    for (own, other), (x1, x2) in zip(inverted[1::2], reversed(seen[:layers]), strict=True):
        assert own.dtype == torch.float32
        assert torch.equal(own, x1)
        assert torch.equal(other, x2)
    for (own, _), (_, x2) in zip(inverted[::2], reversed(seen[:layers]), strict=True):
        assert torch.equal(own, x2)


def move_biases(model):
    for layer in model.layers:
        layer.ffn.router.balance_bias.copy_(torch.linspace(5, -5, EXPERTS))  # nearly every choice is another


@pytest.mark.parametrize("moe", MOES)
@pytest.mark.parametrize("compute", COMPUTE)
def test_biases_that_move_before_backward_change_no_gradient(compute, moe, assert_equal):
    expected = trained(build(moe, compute=compute), tokens(), stored=True)
    model = build(moe, compute=compute)
    loss = forward(model, tokens())
    move_biases(model)
    loss.backward()
    found = {n: t for n, t in taken(model).items() if "balance_bias" not in n}
    assert_equal(found, {n: t for n, t in expected.items() if "balance_bias" not in n})
    assert not torch.equal(
        trained(model, tokens())["layers.0.ffn.router.weight"], expected["layers.0.ffn.router.weight"]
    )


@pytest.mark.parametrize("moe", MOES)
def test_without_the_record_such_a_flip_would_not_pass(moe, monkeypatch, relative_error):
    """What the test above is able to see: choices made anew give other shapes, or other gradients."""
    monkeypatch.setattr(MoE, "replay", lambda self, recorded: contextlib.nullcontext())
    for product in (loop_linear, grouped_mm_linear):
        monkeypatch.setattr("stepline.models.moe.grouped_linear", product)
        expected = trained(build(moe), tokens(), stored=True)
        model = build(moe)
        loss = forward(model, tokens())
        move_biases(model)
        if product is loop_linear:
            with pytest.raises(RuntimeError, match="not the same function in backward"):
                loss.backward()
        else:
            loss.backward()
            found = {n: p.grad for n, p in model.named_parameters()}
            assert relative_error(found, {n: expected[n] for n in found}) > 1e-2


@pytest.mark.parametrize("moe", MOES)
def test_two_forwards_then_one_backward(moe, assert_equal):
    batches = (tokens(1), tokens(2, seq=7))
    model = build(moe)
    expected = trained(model, *batches, stored=True)
    assert total_load(expected) == 4 * TOP_K * (17 + 11)
    assert_equal(trained(model, *batches), expected)


@pytest.mark.parametrize("moe", MOES)
def test_two_forwards_then_backwards_in_either_order(moe, assert_equal):
    batches = [tokens(1), tokens(2)]
    model = build(moe)
    expected = [trained(model, batch, stored=True) for batch in batches]
    for order in ((0, 1), (1, 0)):
        losses = [forward(model, batch) for batch in batches]
        for i in order:
            model.zero_grad()
            losses[i].backward()
            found = {n: p.grad.clone() for n, p in model.named_parameters()}
            assert_equal(found, {n: expected[i][n] for n in found})
