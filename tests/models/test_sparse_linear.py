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
SPARSE, ROWS = Recipe(sparse=True), Recipe(fp8=True, row_scales=True)


def layer(recipe: Recipe, n_in=32, n_out=48, dtype=torch.float64) -> SparseLinear:
    torch.manual_seed(0)
    made = SparseLinear(n_in, n_out, recipe, Mode()).to(dtype)
    if recipe.sparse:
        made.beta.copy_(scale_of(scale_sums(made.weight.detach())))
    return made


def rounded(x, dtype, dim=None):
    """To 8 bits and back, with the scale of the largest magnitude, or of those along `dim`."""
    most = x.abs().max() if dim is None else x.abs().max(dim, keepdim=True).values
    scale = most.float() * (1 / torch.finfo(dtype).max)
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


def test_in_a_dense_phase_no_gradient_is_estimated():
    made = layer(Recipe(sparse=True, mvue=True))
    x, grad = torch.randn(16, 32, dtype=torch.float64), torch.randn(16, 48, dtype=torch.float64)
    errors = []
    for made.mode.sparse in (True, False):
        made.weight.grad = None
        made(x).backward(grad)
        errors.append((made.weight.grad - grad.T @ x).norm() / (grad.T @ x).norm())
    assert errors[0] > 0.1
    assert errors[1] < 1e-12


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


def test_products_with_scales_of_rows_are_those_of_rounded_operands():
    """The scale that a gradient's product is summed over is in the gradient before that is rounded; to bf16's last
    place. Against the products in fp32: within what 8 bits lose."""
    made, spread = layer(ROWS, dtype=torch.float32), torch.logspace(-3, 3, 48)
    with torch.no_grad():
        made.weight.mul_(spread[:, None])
    x = (torch.randn(48, 32) * spread.flip(0)[:, None]).requires_grad_()
    grad, w = torch.randn(48, 48) * spread / spread.mean(), made.weight.detach()
    xq, wq = rounded(x.detach(), E4M3, 1).double(), rounded(w, E4M3, 1).double()
    x_scale, w_scale = (t.detach().abs().amax(1, keepdim=True) / 448 for t in (x, w))
    by_token, by_output = rounded(grad * w_scale.mT, E5M2, 1), rounded(grad * x_scale, E5M2, 0)
    out = made(x)
    dx, dw = torch.autograd.grad(out, (x, made.weight), grad)
    exact = F.linear(x, w), grad @ w, grad.mT @ x.detach()
    for mine, theirs, wide in zip(
        (out, dx, dw),
        (xq @ wq.T, by_token.double() @ (wq / w_scale), by_output.double().T @ (xq / x_scale)),
        exact,
        strict=True,
    ):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, mine.bfloat16().float())
        assert (mine - theirs).norm() / theirs.norm() < 2**-8
        assert (mine - wide).norm() / wide.norm() < 0.1
    rows = (out - exact[0]).norm(dim=1) / exact[0].norm(dim=1)
    assert rows.max() < 0.1  # of every token, whatever its size


def test_one_outlier_costs_the_other_tokens_nothing_with_scales_of_rows():
    x, others = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), torch.arange(64) != 5
    x[5] *= 1e6
    wrong = {}
    for recipe in (Recipe(fp8=True), ROWS):
        made = layer(recipe, dtype=torch.float32)
        exact = F.linear(x, made.weight)[others]
        wrong[recipe] = (made(x)[others] - exact).norm() / exact.norm()
        same = torch.allclose(made(x)[others], made(x[others]), rtol=2**-7, atol=1e-6)
        assert same is recipe.row_scales
    assert wrong[ROWS] < 0.05
    assert wrong[Recipe(fp8=True)] > 20 * wrong[ROWS]


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
        (ROWS, None),
        (Recipe(sparse=True, mvue=True, fp8=True), Algorithm(3, 2, 1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_one_graph(recipe, algorithm, dtype):
    """torch.compile leaves nothing of a layer, nor of its backward, outside of the graph, and no gradient out."""
    torch._dynamo.reset()
    made = layer(recipe, n_out=64, dtype=dtype)
    made.algorithm = algorithm
    if recipe.mvue:
        made.seed.fill_(5)
    x, grad = torch.randn(2, 16, 32, dtype=dtype, requires_grad=True), torch.randn(2, 16, 64, dtype=dtype)
    compiled = torch.compile(made.forward, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        out, plain = compiled(x), made(x)
        assert torch.equal(out, plain)
        gradients = (torch.autograd.grad(y, (x, made.weight), grad) for y in (out, plain))
        assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients, strict=True))
        if recipe.mvue:
            made.seed.add_(1)  # no constant of the graph


@pytest.mark.parametrize("recipe", [Recipe(fp8=True), Recipe(sparse=True, mvue=True, fp8=True), ROWS])
def test_the_operands_of_fp8_products_are_laid_out_as_cuda_takes_them(recipe, monkeypatch):
    """In the place of torch's product stands one that checks what CUDA would."""
    made = layer(recipe, dtype=torch.float32)
    x, grad, types = torch.randn(32, 32, requires_grad=True), torch.randn(32, 48), []

    def strict(a, b, scale_a, scale_b, out_dtype, use_fast_accum):
        (m, k), n = a.shape, b.shape[1]
        assert a.stride() == (k, 1)  # row-major
        assert b.stride() == (1, k)  # column-major
        assert k % 16 == n % 16 == 0
        assert scale_a.dtype == scale_b.dtype == torch.float32
        if recipe.row_scales:
            assert (scale_a.shape, scale_b.shape) == ((m, 1), (1, n))
            assert (scale_a.stride(), scale_b.stride()) == ((1, 1), (n, 1))
            assert (b.dtype, out_dtype) == (E4M3, torch.bfloat16)
        else:
            assert scale_a.numel() == scale_b.numel() == 1
        # backward sums in fp32
        assert use_fast_accum == (not types and not recipe.row_scales)
        types.append((a.dtype, b.dtype, (m, k, n)))
        return ((a.double() @ b.double()) * scale_a * scale_b).to(out_dtype)

    expected = made(x)
    wanted = torch.autograd.grad(expected, (x, made.weight), grad)
    monkeypatch.setattr(torch, "_scaled_mm", strict)
    monkeypatch.setattr(fp8, "has_fp8", lambda _: True)
    out = made(x)
    for mine, theirs in zip(
        (out, *torch.autograd.grad(out, (x, made.weight), grad)), (expected, *wanted), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=2**-7 if recipe.row_scales else 1e-5, atol=1e-5)
    assert types == [(E4M3, E4M3, (32, 32, 48)), (E5M2, E4M3, (32, 48, 32)), (E5M2, E4M3, (48, 32, 32))]


def test_operators_say_what_they_give():
    w, g = torch.randn(16, 32), torch.randn(16, 8)
    scale, seed = torch.tensor(0.01), torch.tensor(3)
    for soft in (False, True):
        torch.library.opcheck(ops.weight_amax, (w, torch.bfloat16, soft))
        torch.library.opcheck(ops.weight_cast, (w, scale, E4M3, torch.bfloat16, soft))
    torch.library.opcheck(ops.estimate_cast, (g, seed, scale, E5M2))


def test_weights_in_bf16_are_scaled_by_beta_itself():
    """Rounded to bf16 first it would be 1.5, and all weights larger by .3 %."""
    torch.manual_seed(0)
    made = SparseLinear(256, 64, SPARSE, Mode()).bfloat16()
    made.beta.fill_(1.4961)
    w = made(torch.eye(256).bfloat16()).mT
    assert torch.equal(w, made.effective_weight())
    exact = soft_threshold(made.weight.detach()).double()
    assert torch.equal(w, (exact * made.beta.double()).bfloat16())
    assert ((w.double() * exact).sum() / exact.square().sum()).item() == pytest.approx(1.4961, rel=2e-4)


def test_beta_survives_casts():
    made = layer(SPARSE, dtype=torch.float32)
    beta = made.beta.clone()
    for cast in (lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.float(), lambda m: m.to("cpu")):
        cast(made)
        assert torch.equal(made.beta, beta)
    experts = SparseExperts(2, 16, 32, SPARSE, Mode())
    experts.w2_beta.fill_(1.2345678)
    assert experts.bfloat16().w2_beta.item() == pytest.approx(1.2345678, rel=1e-7)
    assert experts.w2.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="a multiple of 4, not 30"):
        SparseLinear(30, 8, SPARSE, Mode())
    for wrong in ({"fp8": True, "sparse": True}, {}):
        with pytest.raises(ValueError, match="dense weights in FP8"):
            Recipe(row_scales=True, **wrong)


@pytest.mark.parametrize("recipe", [SPARSE, Recipe(fp8=True), Recipe(sparse=True, fp8=True), ROWS])
def test_experts_compute_what_their_layers_would(recipe):
    torch.manual_seed(0)
    made = SparseExperts(3, 16, 32, recipe, Mode()).double()
    for name in ("w1", "w3", "w2"):
        nn.init.normal_(getattr(made, name), std=0.3)
        if recipe.sparse:
            getattr(made, f"{name}_beta").fill_(1.5)
    counts = torch.tensor([5, 0, 11])
    x = torch.randn(16, 16, dtype=torch.float64, requires_grad=True)

    dim = -1 if recipe.row_scales else None

    def weight(name, e):
        w = getattr(made, name)
        w = ste(w, 1.5) if recipe.sparse else w
        return (w + (rounded(w, E4M3, dim) - w).detach() if recipe.fp8 else w)[e]

    def act(t):
        return t + (rounded(t, E4M3, dim) - t).detach() if recipe.fp8 else t

    def product(name, rows):
        out = torch.stack([weight(name, i) @ r for i, r in zip(e, rows, strict=True)])
        if recipe.fp8:
            out.register_hook(lambda grad: rounded(grad, E5M2, dim))
        return out

    e = torch.repeat_interleave(torch.arange(3), counts)
    xq = act(x)
    rows = product("w2", act(F.silu(product("w1", xq)) * product("w3", xq)))
    out = made(x, counts)
    torch.testing.assert_close(out, rows, rtol=1e-6, atol=1e-6)
    grad, variables = torch.randn_like(out), (x, *made.parameters())
    tolerance = 1e-6 if recipe.fp8 else 1e-11
    for mine, theirs in zip(
        torch.autograd.grad(out, variables, grad), torch.autograd.grad(rows, variables, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


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
