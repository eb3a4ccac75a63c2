"""The machinery of reversible halves: exact sums, what a recompute repeats, what it refuses, what it keeps."""

import contextlib
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepline.models.attention import rope_tables
from stepline.models.config import ModelConfig
from stepline.models.ffn import SwiGLU
from stepline.models.init import init_parameter
from stepline.models.reversible import Chain, Streams
from stepline.models.revffn import RevBlock, run_reversible, take_max

BATCH, SEQ, HIDDEN = 2, 10, 32


class Blocks(nn.Module):
    """Reversible blocks over a parameter in the place of the embedding."""

    def __init__(self, layers, make_ffn=SwiGLU, coupling="exact", **revffn):
        super().__init__()
        self.config = ModelConfig(
            vocab_size=2, hidden_size=HIDDEN, num_layers=layers, num_heads=2, ffn_size=24, init_std=0.2,
            blocks="revffn", coupling=coupling, revffn=revffn,
        )  # fmt: skip
        self.layers = nn.ModuleList(RevBlock(self.config, make_ffn) for _ in range(layers))
        with torch.no_grad():
            for name, p in self.layers.named_parameters():
                p.copy_(init_parameter(name, p.shape, self.config, seed=0))
        self.x = nn.Parameter(torch.randn(BATCH, SEQ, HIDDEN, generator=torch.Generator().manual_seed(1)))
        self.tables = rope_tables(self.config, torch.arange(SEQ), torch.float32)

    def forward(self, stored=False):
        return run_reversible(self.layers, self.x, self.config.revffn, *self.tables, stored=stored)


def loss_of(x):
    return (x.square() * torch.linspace(-1, 2, x.shape[-1])).sum()


def gradients(model, stored=False):
    model.zero_grad()
    loss_of(model(stored)).backward()
    return taken(model)


def taken(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_added_on_the_grid_is_subtracted_exactly(dtype):
    grid, generator = Streams(14), torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x = grid.enter(torch.randn(100, 100, generator=generator, dtype=wide) * 200)
    h = torch.randn(100, 100, generator=generator, dtype=wide).to(dtype)
    y = grid.add(x, h)
    assert y.dtype == x.dtype == wide
    assert y.abs().max() < grid.limit()
    assert torch.equal(grid.subtract(y, h), x)
    assert torch.equal(y * 2**14, (y * 2**14).round())
    assert (y - x - h).abs().max() <= 2.0**-15
    assert not torch.equal(Streams().subtract(Streams().add(x / 3, h), h), x / 3)


def test_the_limit_of_the_grid_is_where_sums_stop_being_exact():
    assert (Streams(14).limit(), Streams(10).limit(), Streams().limit()) == (1024, 2**14, float("inf"))
    assert Streams(14).limit(torch.float64) == 2**39
    step = torch.tensor(2.0**-14)
    for x, exact in ((1023.0, True), (1024.0, False)):
        assert bool(Streams(14).add(torch.tensor(x), step) - x == step) is exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_passes_the_rounding_unchanged(dtype):
    x, h = torch.randn(5, requires_grad=True), torch.randn(5).to(dtype).requires_grad_()
    weight = torch.randn(5)
    (Streams(4).add(x, h) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    assert torch.equal(h.grad, weight.to(dtype))
    (Streams(4).enter(h) * weight).sum().backward()
    assert torch.equal(h.grad, weight.to(dtype) * 2)


@pytest.mark.parametrize("read", [0, 1], ids=["first stream", "second stream"])
def test_backward_from_one_stream_of_the_last_block(read, assert_equal):
    """The last half's gradient is asked for by nobody, or its input's alone; it is inverted all the same."""
    model = Blocks(2)
    found = []
    for chain in (None, Chain()):
        model.zero_grad()
        streams = model.layers[0].streams
        x = [streams.enter(half) for half in model.x.chunk(2, -1)]
        for layer in model.layers:
            x = layer(*x, chain, *model.tables)
        x[read].square().sum().backward()
        found.append(taken(model))
    assert_equal(*found)


def test_streams_changed_between_halves_are_refused():
    model, chain = Blocks(2), Chain()
    x1, x2 = model.layers[0](*model.x.chunk(2, -1), chain, *model.tables)
    with pytest.raises(RuntimeError, match="other streams"):
        model.layers[1](x1, x2 * 1.0, chain, *model.tables)


class Dropping(SwiGLU):
    def forward(self, x):
        return F.dropout(super().forward(F.dropout(x, 0.3)), 0.5)


@pytest.mark.parametrize("coupling", ["exact", "revffn"])
def test_dropout_is_repeated_and_the_generator_left_alone(coupling, assert_equal, relative_error):
    model = Blocks(3, Dropping, coupling, iterations=4)
    found, states = [], []
    for stored in (True, False):
        torch.manual_seed(5)
        loss = loss_of(model(stored))
        torch.rand(3)
        before = torch.get_rng_state()
        model.zero_grad()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), before)
        states.append(before)
        found.append(taken(model))
    assert torch.equal(*states)
    if coupling == "exact":
        assert_equal(*found)
    else:  # the fixed point's error; another mask would be far worse
        assert relative_error(found[1], found[0]) < 1e-2


class Routed(nn.Module):
    """Each token to one of two layers; `flips`: the recompute's router says the opposite."""

    flips = False

    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.hidden_size, 2, bias=False)
        self.experts = nn.ModuleList(SwiGLU(config) for _ in range(2))
        self.recorded, self.replayed, self.calls = None, None, 0

    def forward(self, x):
        logits = self.router(x)
        self.calls += 1
        again = self.calls % 2 == 0
        chosen = (-logits if self.flips and again else logits).argmax(-1)
        if self.replayed is not None:
            chosen = self.replayed.pop(0)
        if self.recorded is not None:
            self.recorded.append(chosen)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            out = torch.where((chosen == i).unsqueeze(-1), expert(x), out)
        return out * logits.softmax(-1).gather(-1, chosen.unsqueeze(-1))


class Replaying(Routed):
    @contextlib.contextmanager
    def record(self):
        self.recorded = []
        yield self.recorded
        self.recorded = None

    @contextlib.contextmanager
    def replay(self, recorded):
        self.replayed = list(recorded)
        yield
        assert not self.replayed
        self.replayed = None


@pytest.mark.parametrize("make_ffn", [Routed, Replaying])
def test_recorded_routing_wins_in_the_recompute(make_ffn, assert_equal, relative_error):
    model = Blocks(3, make_ffn)
    expected = gradients(model, stored=True)
    for layer in model.layers:
        layer.ffn.calls, layer.ffn.flips = 0, True
    actual = gradients(model)
    assert [layer.ffn.calls for layer in model.layers] == [2, 2, 2]
    if make_ffn is Replaying:
        assert_equal(actual, expected)
        assert all(layer.ffn.recorded is layer.ffn.replayed is None for layer in model.layers)
    else:
        assert relative_error(actual, expected) > 1e-2  # what the record is for


class Fickle(SwiGLU):
    """Another function each time."""

    def __init__(self, config, change):
        super().__init__(config)
        self.change, self.calls = change, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 2:
            if self.change == "more":
                return super().forward(x).exp().log()
            if self.change == "fewer":
                return x
            return super().forward(x[:, :-1]).mean(1, keepdim=True).expand_as(x)
        return super().forward(x)


@pytest.mark.parametrize("change", ["more", "fewer", "shapes"])
def test_another_function_in_backward_is_refused(change):
    model = Blocks(1, lambda config: Fickle(config, change))
    with pytest.raises(RuntimeError, match="not the same function in backward"):
        gradients(model)


class Storages(TorchDispatchMode):
    """Every storage that an operation has returned, whoever holds it."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.seen[t.untyped_storage()._cdata] = (
                    StorageWeakRef(t.untyped_storage()),
                    t.untyped_storage().nbytes(),
                )
        return out

    def live(self, *outside):
        """Bytes of those still alive, but for these tensors'."""
        skip = {t.untyped_storage()._cdata for t in outside}
        return sum(n for key, (ref, n) in self.seen.items() if key not in skip and not ref.expired())


def live_after_forward(layers, stored=False, **revffn):
    model = Blocks(layers, **revffn)
    with Storages() as storages:
        loss = loss_of(model(stored))
    take_max(model.layers, "stream_max")
    live = storages.live(*model.parameters())
    del loss
    return live, storages.live(*model.parameters())


def test_activations_after_forward_do_not_grow_with_depth():
    live_after_forward(1)  # the first import of torch's compiler leaves a cycle that holds frames
    gc.collect()
    gc.disable()  # what a cycle holds would count as live
    try:
        flat = live_after_forward(2)
        assert flat[0] > 0
        assert flat[1] == 0  # freed with the graph, without a backward
        for layers in (4, 16):
            assert live_after_forward(layers) == flat
        assert live_after_forward(4, coupling="revffn") == flat
        stream = BATCH * SEQ * HIDDEN // 2 * 4
        for layers, every, anchors in ((4, 1, 3), (8, 2, 3), (9, 4, 2)):
            live, after = live_after_forward(layers, anchor_every=every)
            assert live - flat[0] == anchors * 2 * stream
            assert after == 0
        stored = [live_after_forward(layers, stored=True)[0] for layers in (2, 4, 6)]
        assert stored[2] - stored[1] == stored[1] - stored[0] > 20 * stream
    finally:
        gc.enable()


def test_activations_in_backward_do_not_grow_with_depth():
    """The most that a backward holds at the beginning of a block, beside gradients of weights."""
    peaks = {}
    for layers in (3, 12):
        model, found = Blocks(layers), []
        with Storages() as storages:
            loss = loss_of(model())
            take_max(model.layers, "stream_max")

            def look(_gradient, model=model, storages=storages, found=found):
                grads = [p.grad for p in model.parameters() if p.grad is not None]
                found.append(storages.live(*model.parameters(), *grads))

            for layer in model.layers:
                layer.ffn.w2.weight.register_hook(look)
            loss.backward()
        peaks[layers] = found
    assert len(peaks[12]) == 12
    assert max(peaks[12]) == max(peaks[3])
