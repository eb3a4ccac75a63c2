"""2:4 sparse and FP8 layers on CUDA against the references on the CPU: the same bits where numbers are cast, and FP8's
own tolerance where they are multiplied."""

import pytest
import torch

from stepline.kernels import ops, sparse_mm
from stepline.kernels.fp8 import E4M3, E5M2, Scaled, cast, scale_for, scaled_mm
from stepline.kernels.sparse24 import pack24, pack_bits, soft_threshold
from stepline.kernels.sparse_mm import Algorithm, Cache
from stepline.models.sparse_linear import Mode, Recipe, SparseLinear
from stepline.trainer.run.products import measure_shape

MISSING = sparse_mm.missing(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]
COMPUTE = (torch.float32, torch.bfloat16)


def same(cuda: torch.Tensor, cpu: torch.Tensor) -> bool:
    return torch.equal(cuda.cpu().view(torch.uint8), cpu.view(torch.uint8))


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("soft", [True, False])
def test_weights_are_cast_to_the_same_bits(compute, soft):
    from stepline.kernels import triton_ops

    w = torch.randn(384, 1000, generator=torch.Generator().manual_seed(0))
    w[0] *= 1e-6
    amax = ops.weight_amax(w, compute, soft)
    assert ops.weight_amax(w.cuda(), compute, soft).item() == amax.item()
    scale = scale_for(amax, E4M3)
    expected = ops.weight_cast(w, scale, E4M3, compute, soft)
    assert same(ops.weight_cast(w.cuda(), scale.cuda(), E4M3, compute, soft), expected)
    if soft:
        values, bits = triton_ops.cast_packed(w.cuda(), scale.cuda(), E4M3, compute)
        wanted, places = pack24(expected)
        assert same(values, wanted)
        assert torch.equal(bits.cpu(), pack_bits(places))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_estimator_draws_the_same_bits(dtype):
    from stepline.kernels import triton_ops

    g = torch.randn(1024, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    g[4:8] = 0
    seed, scale = torch.tensor(1234567890123), scale_for(2 * g.abs().amax(), dtype)
    expected = ops.estimate_cast(g, seed, scale, dtype)
    assert same(ops.estimate_cast(g.cuda(), seed.cuda(), scale.cuda(), dtype), expected)
    values, bits = triton_ops.estimate_packed(g.cuda(), seed.cuda(), scale.cuda(), dtype)
    wanted, places = pack24(expected)
    assert same(values, wanted)
    assert torch.equal(bits.cpu(), pack_bits(places))


@pytest.mark.parametrize("tokens", [256, 2048])
def test_products_are_those_of_the_dequantised_operands(tokens):
    draw = torch.Generator().manual_seed(0)
    x = cast(torch.randn(tokens, 512, generator=draw), E4M3)
    w = cast(soft_threshold(torch.randn(384, 512, generator=draw)), E4M3)
    expected = x.float(torch.float64) @ w.float(torch.float64).mT
    xc, wc = (Scaled(t.data.cuda(), t.scale.cuda()) for t in (x, w))
    packed, alpha = torch._cslt_compress(wc.data), (xc.scale * wc.scale).expand(384).contiguous()
    best = sparse_mm.search(packed, xc.data, alpha, torch.bfloat16)
    for got in (
        scaled_mm(xc, wc.mT, torch.bfloat16),
        sparse_mm.compressed_mm(packed, xc.data, alpha, torch.bfloat16, Algorithm()),
        sparse_mm.compressed_mm(packed, xc.data, alpha, torch.bfloat16, best),
        sparse_mm.sparse_mm(xc.data, wc.data, xc.scale * wc.scale, torch.bfloat16, 0, 1, -1),
    ):
        assert got.shape == expected.shape
        assert ((got.cpu().double() - expected).norm() / expected.norm()).item() < 5e-3


@pytest.mark.parametrize("kind", [E4M3, E5M2])
@pytest.mark.parametrize("tokens", [48, 256, 2048])
def test_products_with_scales_of_rows_are_those_of_the_dequantised_operands(kind, tokens):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 512, generator=draw) * torch.logspace(-3, 3, tokens)[:, None]
    w = torch.randn(384, 512, generator=draw) * torch.logspace(-3, 3, 384)[:, None]
    a, b = cast(x, kind, dim=-1), cast(w, E4M3, dim=-1)
    expected, reference = (
        a.float(torch.float64) @ b.float(torch.float64).mT,
        scaled_mm(a, b.mT, torch.bfloat16),
    )
    ac, bc = cast(x.cuda(), kind, dim=-1), cast(w.cuda(), E4M3, dim=-1)
    assert same(ac.data, a.data)
    assert torch.equal(ac.scale.cpu(), a.scale)
    got = scaled_mm(ac, bc.mT, torch.bfloat16).cpu().double()
    for wanted in (expected, reference.double()):
        rows = (got - wanted).norm(dim=1) / wanted.norm(
            dim=1
        )  # each token by itself: their sizes are far apart
        assert rows.max() < 5e-3
    with pytest.raises(ValueError, match="give bf16"):
        scaled_mm(ac, bc.mT, torch.float32)


@pytest.mark.parametrize(
    ("recipe", "algorithm"),
    [
        (Recipe(sparse=True), None),
        (Recipe(fp8=True), None),
        (Recipe(fp8=True, row_scales=True), None),
        (Recipe(sparse=True, fp8=True), None),
        (Recipe(sparse=True, fp8=True), Algorithm()),
        (Recipe(sparse=True, mvue=True, fp8=True), Algorithm()),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_gives_what_the_reference_gives(recipe, algorithm, compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, grad = torch.randn(256, 512).bfloat16(), torch.randn(256, 384).bfloat16()
    weight, results = torch.randn(384, 512).bfloat16() / 16, []
    for device in ("cpu", "cuda"):
        made = SparseLinear(512, 384, recipe, Mode()).to(torch.bfloat16).to(device)
        made.algorithm = algorithm
        with torch.no_grad():
            made.weight.copy_(weight)
            if recipe.sparse:
                made.beta.fill_(1.5)
            if recipe.mvue:
                made.seed.fill_(3)
        forward = torch.compile(made.forward, fullgraph=True) if compiled and device == "cuda" else made
        at = x.to(device).requires_grad_()
        y = forward(at)
        results.append([y, *torch.autograd.grad(y, (at, made.weight), grad.to(device))])
    for cpu, cuda in zip(*results, strict=True):
        cpu, cuda = cpu.detach().double(), cuda.detach().cpu().double()
        assert ((cuda - cpu).norm() / cpu.norm()).item() < 2e-2


def test_a_shape_is_measured():
    timing = measure_shape((512, 1024, 2048), torch.device("cuda", 0), torch.bfloat16)
    assert 0 < timing.sparse_ms < 100
    assert 0 < timing.dense_ms < 100
    assert "512 x 1024" in Cache.key(torch.device("cuda", 0), 512, 1024, 2048, torch.bfloat16)
