"""The backward of reversible blocks against stored activations."""

import itertools
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stepline.models.revffn import take_max
from stepline.models.sparse_linear import Recipe, convert

reversible = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "reversible_models.py")))
shape, build, gentle, tokens = reversible.shape, reversible.build, reversible.gentle, reversible.tokens
DTYPES, loss_of, taken, read_streams = (
    reversible.DTYPES, reversible.loss_of, reversible.taken, reversible.read_streams
)  # fmt: skip


def gradients(model, *batches, **forward):
    """Of the sum of the batches' losses, after one backward."""
    model.zero_grad()
    sum(loss_of(model(batch, **forward)) for batch in batches).backward()
    return taken(model)


@pytest.fixture
def inverted():
    """(own, other) that backward found, by half, last half first."""
    with reversible.inversions() as found:
        yield found


@pytest.mark.filterwarnings("error")  # of a norm whose weight is in another type than the stream
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("layers", [4, 48])
def test_on_a_grid_gradients_and_states_are_bit_equal(layers, compute, inverted, assert_equal):
    model = build(shape(layers), DTYPES[compute])
    seen = read_streams(model)
    expected = gradients(model, tokens(), stored=True)
    assert len(seen) == layers
    assert not inverted
    assert_equal(gradients(model, tokens()), expected)
    assert len(inverted) == 2 * layers
    for (own, other), (x1, x2) in zip(inverted[1::2], reversed(seen[:layers]), strict=True):
        assert own.dtype == torch.float32
        assert torch.equal(own, x1)
        assert torch.equal(other, x2)
    for (own, _), (_, x2) in zip(inverted[::2], reversed(seen[:layers]), strict=True):
        assert torch.equal(own, x2)
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in expected.values())


def test_in_float64_states_and_gradients_return_without_a_grid(inverted, relative_error):
    model = build(shape(12, streams="fp32"), torch.float64)
    seen = read_streams(model)
    expected = gradients(model, tokens(), stored=True)
    assert relative_error(gradients(model, tokens()), expected) < 1e-13
    for (own, other), (x1, x2) in zip(inverted[1::2], reversed(seen[:12]), strict=True):
        assert own.dtype == torch.float64
        torch.testing.assert_close(own, x1, rtol=0, atol=1e-13)
        torch.testing.assert_close(other, x2, rtol=0, atol=1e-13)


@pytest.mark.parametrize("layers", [4, 48])
def test_in_fp32_without_a_grid_gradients_drift_by_roundings(layers, relative_error):
    model = build(shape(layers, streams="fp32"))
    assert relative_error(gradients(model, tokens()), gradients(model, tokens(), stored=True)) < 5e-6


@pytest.mark.parametrize("adapters", [False, True])
def test_fixed_point_gradients_within_the_floor(adapters, relative_error):
    model = gentle(build(shape(4, "revffn", "fp32", iterations=12, adapters=adapters)))
    expected = gradients(model, tokens(), stored=True)
    assert take_max(model.layers, "residual") is None
    assert relative_error(gradients(model, tokens()), expected) < 2e-6
    assert take_max(model.layers, "residual") < 2e-6
    assert take_max(model.layers, "residual") is None


@pytest.mark.parametrize(
    ("compute", "streams", "error"),
    [("fp32", "grid", 1e-5), ("bf16", "grid", 5e-3), ("bf16", "fp32", 5e-3)],
)
def test_fixed_point_has_a_floor_where_branches_are_rounded(compute, streams, error, relative_error):
    """Neighbours that round alike are fixed points too: more iterations do not help, and a grid is no cure."""
    errors, residuals = [], []
    for iterations in (8, 16):
        model = gentle(build(shape(4, "revffn", streams, iterations=iterations), DTYPES[compute]))
        expected = gradients(model, tokens(), stored=True)
        errors.append(relative_error(gradients(model, tokens()), expected))
        residuals.append(take_max(model.layers, "residual"))
    assert error / 10 < errors[1] <= errors[0] < error
    assert residuals[0] == residuals[1] > 0


def test_in_8_bits_a_fixed_point_adds_as_much_error_as_the_bits_do(relative_error):
    """What is said before the first step (trainer/plan/effects.py), of gradients against those of fp32."""
    wide = {"hidden_size": 64, "head_dim": 16, "ffn_size": 32}  # what FP8 products take
    model = gentle(build(shape(12, "revffn", "grid", iterations=8).model_copy(update=wide)))
    batch = tokens(seq=16)
    plain = gradients(model, batch, stored=True)
    weights = model.state_dict()
    convert(model, Recipe(fp8=True), Recipe(fp8=True))
    model.load_state_dict(weights)
    stored, replayed = gradients(model, batch, stored=True), gradients(model, batch)
    error = relative_error(stored, plain)
    assert error / 3 < relative_error(replayed, stored) < 1.5 * error
    assert relative_error(replayed, plain) < 1.3 * error


def test_residual_shrinks_with_the_iterations_and_tells_the_error(relative_error):
    errors, residuals = [], []
    for n in (1, 2, 4, 8):
        model = gentle(build(shape(4, "revffn", "fp32", iterations=n), torch.float64))
        expected = gradients(model, tokens(), stored=True)
        errors.append(relative_error(gradients(model, tokens()), expected))
        residuals.append(take_max(model.layers, "residual").item())
    for few, more in itertools.pairwise(residuals):
        assert more < few / 2
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 100


@pytest.mark.parametrize(
    "revffn", [{"adapters": True}, {"anchor_every": 1}, {"anchor_every": 2}, {"anchor_every": 3}], ids=str
)
def test_adapters_and_anchors(revffn, assert_equal):
    model = build(shape(5, **revffn))
    assert_equal(gradients(model, tokens()), gradients(model, tokens(), stored=True))


def test_anchors_stop_the_drift(relative_error):
    errors = []
    for every in (None, 2):
        model = build(shape(24, streams="fp32", anchor_every=every))
        errors.append(relative_error(gradients(model, tokens()), gradients(model, tokens(), stored=True)))
    assert errors[1] < errors[0]


def test_documents(assert_equal, relative_error):
    model, ids = build(shape()), torch.tensor([[0] * 3 + [1] * 7, [0] * 6 + [1] * 4])
    expected = gradients(model, tokens(), stored=True, doc_ids=ids)
    assert_equal(gradients(model, tokens(), doc_ids=ids), expected)
    assert relative_error(gradients(model, tokens(), stored=True), expected) > 1e-3


FROZEN = {
    "embedding": ["embed"],
    "embedding and first block": ["embed", "layers.0."],
    "embedding and all blocks but the third": ["embed", "layers.0.", "layers.1.", "layers.3."],
    "middle blocks": ["layers.1.", "layers.2."],
    "last block": ["layers.3."],
    "embedding and norms": ["embed", "_norm"],
    "attention": ["embed", ".attn"],
    "all but norms": ["embed", ".attn.", ".ffn.", "head"],
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_frozen_parts(frozen, assert_equal):
    model = build(shape())
    for name, p in model.named_parameters():
        p.requires_grad_(not any(part in name for part in frozen))
    expected = gradients(model, tokens(), stored=True)
    assert expected
    assert_equal(gradients(model, tokens()), expected)


def test_accumulation(assert_equal):
    model = build(shape())
    sums = []
    for stored in (True, False):
        model.zero_grad()
        for seed in range(3):
            loss_of(model(tokens(seed), stored=stored)).backward()
        sums.append(taken(model))
    assert_equal(*sums)


def test_two_forwards_then_one_backward(assert_equal):
    model = build(shape())
    expected = gradients(model, tokens(1), tokens(2, seq=7), stored=True)
    assert_equal(gradients(model, tokens(1), tokens(2, seq=7)), expected)


def test_two_forwards_then_backwards_in_either_order(assert_equal):
    model = build(shape())
    expected = [gradients(model, tokens(seed), stored=True) for seed in (1, 2)]
    for order in ((0, 1), (1, 0)):
        losses = [loss_of(model(tokens(seed))) for seed in (1, 2)]
        for i in order:
            model.zero_grad()
            losses[i].backward()
            assert_equal(taken(model), expected[i])


def test_without_gradient_forward_is_the_same():
    model = build(shape())
    with torch.no_grad():
        logits = model(tokens())
    assert torch.equal(logits, model(tokens()))
    assert torch.equal(logits, model(tokens(), stored=True))


def test_second_backward_is_refused():
    model = build(shape())
    loss = loss_of(model(tokens()))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward through reversible blocks"):
        loss.backward()


def test_a_compiled_half_runs_again_by_its_first_graphs():
    """Backward's recompute finds in every block the graphs that the forward's halves were compiled to."""
    model, compiled = build(shape()), []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for layer in model.layers:
        for module in (layer.attn, layer.ffn):
            module.forward = torch.compile(module.forward, backend=backend)
    found, expected = gradients(model, tokens()), gradients(build(shape()), tokens())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # norms are other kernels there
    assert len(compiled) == 2  # attention's and the feed-forward layer's


@pytest.mark.parametrize("coupling", ["exact", "revffn"])
@pytest.mark.parametrize("backward_too", [False, True], ids=["forward alone", "backward too"])
def test_autocast(backward_too, coupling, assert_equal, relative_error):
    model = gentle(build(shape(3, coupling, iterations=16)))
    found = []
    for stored in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens(), stored=stored)
        assert logits.dtype == torch.bfloat16
        loss = loss_of(logits)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_too):
            loss.backward()
        found.append(taken(model))
    assert relative_error(gradients(model, tokens()), found[0]) > 1e-4  # autocast did something
    if coupling == "exact":
        assert_equal(*found)
    else:
        assert relative_error(found[1], found[0]) < 5e-3


def test_compiled_halves(assert_equal, relative_error):
    model = build(shape(2))
    expected = gradients(model, tokens(), stored=True)
    for layer in model.layers:
        layer.attn.compile(backend="aot_eager")
        layer.ffn.compile(backend="aot_eager")
    assert_equal(gradients(model, tokens()), gradients(model, tokens(), stored=True))
    assert relative_error(gradients(model, tokens()), expected) < 1e-6


def test_the_streams_maximum_is_that_of_forwards_alone():
    model = build(shape())
    seen = read_streams(model)
    for layer in model.layers:
        layer.register_forward_hook(lambda _m, _args, out: seen.append(out))
    losses = [loss_of(model(tokens(seed))) for seed in (1, 2)]
    expected = max(t.abs().max() for pair in seen for t in pair)
    losses[0].backward()  # recomputes
    largest = take_max(model.layers, "stream_max")
    assert largest.shape == ()
    assert largest == expected
    losses[1].backward()
    assert take_max(model.layers, "stream_max") is None
    assert "stream_max" not in str(model.state_dict().keys())
