"""S-STE's layers against autograd of the plain formula, FP8 ones against explicit rounding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stepline.kernels import fp8, ops
from stepline.kernels.fp8 import E4M3, E5M2
from stepline.kernels.sparse24 import scale_of, scale_sums, soft_threshold
from stepline.kernels.sparse_mm import Algorithm
from stepline.models.config import ModelConfig
from stepline.models.init import init_model
from stepline.models.sparse_linear import Mode, Recipe, SparseExperts, SparseLinear, convert, sparse_weights
from stepline.models.transformer import Transformer

SHAPE = {"vocab_size": 31, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_size": 48}
SPARSE = Recipe(sparse=True)


def layer(recipe: Recipe, n_in=32, n_out=48, dtype=torch.float64) -> SparseLinear:
    torch.manual_seed(0)
    made = SparseLinear(n_in, n_out, recipe, Mode()).to(dtype)
    if recipe.sparse:
        made.beta.copy_(scale_of(scale_sums(made.weight.detach())))
    return made


def rounded(x, dtype):
    """To 8 bits and back, with the scale of the largest magnitude."""
    scale = x.abs().max().float() / torch.finfo(dtype).max
    return (x / scale.to(x.dtype)).to(dtype).to(x.dtype) * scale.to(x.dtype)


def ste(weight, beta):
    return weight + (beta * soft_threshold(weight) - weight).detach()


def test_products_and_gradients_are_those_of_the_straight_through_formula():
    sparse = layer(SPARSE)
    x = torch.randn(2, 16, 32, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 16, 48, dtype=torch.float64)
    out, expected = sparse(x), F.linear(x, ste(sparse.weight, sparse.beta))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(out, (x, sparse.weight), grad),
        torch.autograd.grad(expected, (x, sparse.weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    sparse.mode.sparse = False  # the dense phase
    torch.testing.assert_close(sparse(x), F.linear(x, sparse.weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recipe", [Recipe(fp8=True), Recipe(sparse=True, fp8=True)])
def test_fp8_products_are_those_of_rounded_operands(recipe):
    made = layer(recipe, dtype=torch.float32)
    x, grad = torch.randn(32, 32, requires_grad=True), torch.randn(32, 48)
    w = soft_threshold(made.weight.detach()) if recipe.sparse else made.weight.detach()
    beta = made.beta if recipe.sparse else 1.0
    xq, wq, gq = (
        rounded(x.detach(), E4M3).double(),
        rounded(w, E4M3).double() * beta,
        rounded(grad, E5M2).double(),
    )
    out = made(x)
    dx, dw = torch.autograd.grad(out, (x, made.weight), grad)
    for mine, theirs in ((out, xq @ wq.T), (dx, gq @ wq), (dw, gq.T @ xq)):
        assert (mine - theirs).norm() / theirs.norm() < 1e-6


def test_the_estimators_gradient_is_right_on_average_and_24_sparse():
    made = layer(Recipe(sparse=True, mvue=True))
    x, grad = (
        torch.randn(30, 32, dtype=torch.float64),
        torch.randn(30, 48, dtype=torch.float64),
    )  # 30: filled up
    exact = grad.T @ x

    def drawn(seed):
        made.seed.fill_(seed)
        return torch.autograd.grad(made(x), made.weight, grad)[0]

    draws = torch.stack([drawn(seed) for seed in range(400)])
    z = (draws.mean(0) - exact) / (draws.std(0) / 20)
    assert z.abs().mean() < 1.0
    assert z.abs().max() < 6
    assert torch.equal(drawn(0), draws[0])
    assert not torch.equal(draws[1], draws[0])


@pytest.mark.parametrize(
    ("recipe", "algorithm"),
    [
        (SPARSE, None),
        (Recipe(sparse=True, mvue=True), None),
        (Recipe(fp8=True), None),
        (Recipe(sparse=True, mvue=True, fp8=True), Algorithm(3, 2, 1)),
    ],
)
def test_a_layer_is_one_graph(recipe, algorithm):
    """torch.compile leaves nothing of a layer, nor of its backward, outside of the graph."""
    torch._dynamo.reset()
    made = layer(recipe, n_out=64, dtype=torch.float32)
    made.algorithm = algorithm
    if recipe.mvue:
        made.seed.fill_(5)
    x, grad = torch.randn(2, 16, 32, requires_grad=True), torch.randn(2, 16, 64)
    compiled = torch.compile(made.forward, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        out, plain = compiled(x), made(x)
        assert torch.equal(out, plain)
        gradients = (torch.autograd.grad(y, (x, made.weight), grad) for y in (out, plain))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        if recipe.mvue:
            made.seed.add_(1)  # no constant of the graph


@pytest.mark.parametrize("recipe", [Recipe(fp8=True), Recipe(sparse=True, mvue=True, fp8=True)])
def test_the_operands_of_fp8_products_are_laid_out_as_cuda_takes_them(recipe, monkeypatch):
    """torch's own product is there on CPUs too, where it takes what CUDA refuses."""
    made = layer(recipe, dtype=torch.float32)
    x, grad, real, types = torch.randn(32, 32, requires_grad=True), torch.randn(32, 48), torch._scaled_mm, []

    def strict(a, b, scale_a, scale_b, out_dtype):
        (m, k), n = a.shape, b.shape[1]
        assert a.stride() == (k, 1)  # row-major
        assert b.stride() == (1, k)  # column-major
        assert k % 16 == n % 16 == 0
        assert scale_a.dtype == scale_b.dtype == torch.float32
        assert scale_a.numel() == scale_b.numel() == 1
        types.append((a.dtype, b.dtype, (m, k, n)))
        return real(a, b, scale_a, scale_b, out_dtype=out_dtype)

    expected = made(x)
    wanted = torch.autograd.grad(expected, (x, made.weight), grad)
    monkeypatch.setattr(torch, "_scaled_mm", strict)
    monkeypatch.setattr(fp8, "has_fp8", lambda _: True)
    out = made(x)
    for mine, theirs in zip(
        (out, *torch.autograd.grad(out, (x, made.weight), grad)), (expected, *wanted), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert types == [(E4M3, E4M3, (32, 32, 48)), (E5M2, E4M3, (32, 48, 32)), (E5M2, E4M3, (48, 32, 32))]


def test_operators_say_what_they_give():
    w, g = torch.randn(16, 32), torch.randn(16, 8)
    scale, seed = torch.tensor(0.01), torch.tensor(3)
    for soft in (False, True):
        torch.library.opcheck(ops.weight_amax, (w, torch.bfloat16, soft))
        torch.library.opcheck(ops.weight_cast, (w, scale, E4M3, torch.bfloat16, soft))
    torch.library.opcheck(ops.estimate_cast, (g, seed, scale, E5M2))


def test_beta_survives_casts():
    made = layer(SPARSE, dtype=torch.float32)
    beta = made.beta.clone()
    for cast in (lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.float(), lambda m: m.to("cpu")):
        cast(made)
        assert torch.equal(made.beta, beta)
    with pytest.raises(ValueError, match="a multiple of 4, not 30"):
        SparseLinear(30, 8, SPARSE, Mode())


@pytest.mark.parametrize("recipe", [SPARSE, Recipe(fp8=True), Recipe(sparse=True, fp8=True)])
def test_experts_compute_what_their_layers_would(recipe):
    torch.manual_seed(0)
    made = SparseExperts(3, 16, 32, recipe, Mode()).double()
    for name in ("w1", "w3", "w2"):
        nn.init.normal_(getattr(made, name), std=0.3)
        if recipe.sparse:
            getattr(made, f"{name}_beta").fill_(1.5)
    counts = torch.tensor([5, 0, 11])
    x = torch.randn(16, 16, dtype=torch.float64, requires_grad=True)

    def weight(name, e):
        w = getattr(made, name)
        w = ste(w, 1.5) if recipe.sparse else w
        return (w + (rounded(w, E4M3) - w).detach() if recipe.fp8 else w)[e]

    def act(t):
        return t + (rounded(t, E4M3) - t).detach() if recipe.fp8 else t

    rows = []
    e = torch.repeat_interleave(torch.arange(3), counts)
    xq = act(x)
    inner = torch.stack(
        [F.silu(weight("w1", i) @ r) * (weight("w3", i) @ r) for i, r in zip(e, xq, strict=True)]
    )
    rows = torch.stack([weight("w2", i) @ r for i, r in zip(e, act(inner), strict=True)])
    out = made(x, counts)
    torch.testing.assert_close(out, rows, rtol=1e-6, atol=1e-6)
    if not recipe.fp8:
        grad = torch.randn_like(out)
        variables = (x, *made.parameters())
        for mine, theirs in zip(
            torch.autograd.grad(out, variables, grad), torch.autograd.grad(rows, variables, grad), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_conversion_keeps_every_name_and_leaves_the_rest_dense():
    for extra in ({}, {"ffn": "moe", "moe": {"shared_size": 16}}, {"blocks": "revffn"}):
        config = ModelConfig(**SHAPE | extra)
        with torch.device("meta"):
            plain, sparse = Transformer(config), Transformer(config)
        convert(sparse, SPARSE, Recipe())
        assert [n for n, _ in sparse.named_parameters()] == [n for n, _ in plain.named_parameters()]
        names = {name for name, _, _ in sparse_weights(sparse)}
        assert names == {n for n, p in plain.named_parameters() if ".ffn." in n and "router" not in n}


def test_a_sparse_model_multiplies_by_24_sparse_weights():
    config = ModelConfig(**SHAPE)
    sparse, dense = Transformer(config), Transformer(config)
    convert(sparse, SPARSE, Recipe())
    init_model(sparse, config, seed=0)
    init_model(dense, config, seed=0)
    for name, weight, beta in sparse_weights(sparse):
        beta.copy_(scale_of(scale_sums(weight.detach())))
        with torch.no_grad():
            dense.get_parameter(name).copy_(beta * soft_threshold(weight))
    tokens = torch.arange(20).view(2, 10)
    torch.testing.assert_close(sparse(tokens), dense(tokens), rtol=1e-5, atol=1e-6)
