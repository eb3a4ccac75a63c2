"""The Triton kernels bit by bit against the references, by Triton's interpreter; and compiled for Hopper."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stepline.kernels.fp8 import E4M3, E5M2, cast, scale_for
from stepline.kernels.sparse24 import (
    mvue24,
    pack24,
    pack_bits,
    philox_uniform,
    soft_threshold,
    unpack24,
    unpack_bits,
)

pytest.importorskip("triton")
SEED = torch.tensor(1234567890123456789)
TYPES = (E4M3, E5M2)
COMPUTE = (torch.float32, torch.bfloat16, torch.float16)


def weights() -> torch.Tensor:
    """More than a block and no whole number of blocks; ties, zeros, signed zeros, tiny and large groups."""
    x = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    x[0, :8] = 0
    x[0, 8:16] = -0.0
    x[1] *= 1e-6
    x[2, :4] = torch.tensor([1.0, 1.0, -1.0, 1.0])
    x[3] *= 2.0 ** torch.randint(-20, 6, (96,), generator=torch.Generator().manual_seed(1))
    x[4, ::4] = 0
    return x


def gradients() -> torch.Tensor:
    """`[tokens, cols]`: groups of zeros, with one large token, with two values, of all magnitudes."""
    g = torch.randn(72, 40, generator=torch.Generator().manual_seed(2))
    g[:4] = 0
    g[4] *= 100
    g[8:10] = 0
    g[16:20] = torch.tensor([1e-20, 0.0, 2e-20, 1.0])[:, None]  # what is small beside a sum of all
    g[12:16] *= 2.0 ** torch.randint(-18, 4, (4, 40), generator=torch.Generator().manual_seed(3))
    return g


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """What each kernel gives for each case, all run by one process."""
    x, g, cases = weights(), gradients(), {}
    for compute in COMPUTE:
        for soft in (True, False):
            source = soft_threshold(x.to(compute)) if soft else x.to(compute)
            cases["amax", compute, soft] = ("amax", (x, compute, soft))
            for dtype in TYPES:
                scale = scale_for(source.abs().amax(), dtype)
                cases["cast", compute, soft, dtype] = ("cast", (x, scale, dtype, compute, soft))
                if soft:
                    cases["packed", compute, dtype] = ("cast_packed", (x, scale, dtype, compute))
    for kind in (torch.float32, torch.bfloat16):
        for dtype in TYPES:
            arguments = (g.to(kind), SEED, scale_for(2 * g.to(kind).abs().amax(), dtype), dtype)
            cases["estimate", kind, dtype] = ("estimate", arguments)
            cases["estimate packed", kind, dtype] = ("estimate_packed", arguments)
    folder = tmp_path_factory.mktemp("triton")
    torch.save(list(cases.values()), folder / "cases")
    script = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, str(script), str(folder / "cases"), str(folder / "out")]
    subprocess.run(command, check=True, env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=300)
    return dict(zip(cases, torch.load(folder / "out"), strict=True))


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("soft", [True, False])
def test_threshold_and_cast_are_those_of_the_reference(kernels, compute, soft):
    source = weights().to(compute)
    source = soft_threshold(source) if soft else source
    assert kernels["amax", compute, soft] == source.abs().amax().float()
    for dtype in TYPES:
        expected = cast(source, dtype).data
        assert torch.equal(as_bytes(kernels["cast", compute, soft, dtype]), as_bytes(expected))
        if soft:
            values, bits = kernels["packed", compute, dtype]
            wanted, places = pack24(expected)
            assert torch.equal(as_bytes(values), as_bytes(wanted))
            assert torch.equal(bits, pack_bits(places))
            assert bits.numel() * 8 == values.numel() * 2 == expected.numel()
            again = unpack24(values, unpack_bits(bits))
            assert torch.equal(again.float(), expected.float())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_estimator_is_that_of_the_reference_with_the_same_numbers(kernels, kind, dtype):
    g = gradients().to(kind)
    wide = g.float().mT.contiguous()
    y = mvue24(wide, philox_uniform(SEED, (40, 18)))
    assert y.abs().max() <= 2 * wide.abs().max()
    expected = cast(y, dtype, 2 * g.abs().amax()).data
    assert torch.equal(as_bytes(kernels["estimate", kind, dtype]), as_bytes(expected))
    values, bits = kernels["estimate packed", kind, dtype]
    wanted, places = pack24(expected)
    assert torch.equal(as_bytes(values), as_bytes(wanted))
    assert torch.equal(bits, pack_bits(places))


def test_the_numbers_are_philoxs_and_uniform():
    """Known answers of Philox 4x32-10 (Salmon et al.): the first output for key and counter 0."""
    first = philox_uniform(torch.tensor(0), (4,))
    assert first[0].item() == pytest.approx(0x6627E8D5 / 2**31, abs=1e-6)
    u = philox_uniform(SEED, (2**18,)).double()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * len(u))
    assert abs(u.square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / len(u))
    other = philox_uniform(SEED + 1, (2**18,)).double()  # keys next to each other
    correlation = ((u - 0.5) * (other - 0.5)).mean() * 12
    assert abs(correlation) < 5 / math.sqrt(len(u))


POINTERS = {"x_ptr": "*fp32", "scale_ptr": "*fp32", "bits_ptr": "*u8", "count": "i32", "seed_ptr": "*i64"}


def sources():
    """Kernel, its own types, its constants; weights are rounded to bf16 and cast to E4M3, gradients to E5M2."""
    import triton.language as tl

    from stepline.kernels import triton_ops as ops

    weight = {"KIND": tl.bfloat16, "SOFT": True, "SIZE": ops.BLOCK}
    gradient = {"KIND": tl.float8e5, "GROUPS": ops.TILE_GROUPS, "COLS": ops.TILE_COLS}
    yield ops._amax_kernel, {"out_ptr": "*fp32"}, weight
    for pack in (False, True):
        yield ops._cast_kernel, {"out_ptr": "*fp8e4nv"}, weight | {"PACK": pack}
        types = {"g_ptr": "*bf16", "tokens": "i32", "cols": "i32", "out_ptr": "*i16" if pack else "*i32"}
        yield ops._estimate_kernel, types, gradient | {"PACK": pack}


def test_every_kernel_compiles_for_hopper_without_a_gpu(hopper):
    for kernel, types, constants in sources():
        known = POINTERS | types
        # as for the lengths that are met: multiples of 16, at such addresses
        ptx = hopper(kernel, known, constants, {*known}, {"enable_fp_fusion": False})
        assert "fma." not in ptx
        assert "div.full" not in ptx  # which may be off by two units in the last place
        assert "ld.global.v4.b32" in ptx  # 16 bytes a thread
        if "amax" not in kernel.__name__:
            kind = "e5m2x2" if "estimate" in kernel.__name__ else "e4m3x2"
            assert f"cvt.rn.satfinite.{kind}.f32" in ptx  # ties to even, and saturating
