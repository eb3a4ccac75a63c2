"""Peaks by exact device name, and MFU."""

import pytest

from stepline.trainer.watch.peaks import mfu, peak_flops


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-32GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
    ],
)
def test_known_devices(name, teraflops):
    assert peak_flops(name) == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H200 MIG 1g.18gb",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "cpu",
        "",
    ],
)
def test_everything_else_is_unknown(name):
    assert peak_flops(name) is None


def test_mfu():
    # 1.3B parameters, 6 N FLOPs a token, 60k tokens/s on one H200
    assert mfu(60_000, 6 * 1.3e9, peak_flops("NVIDIA H200")) == pytest.approx(0.47320525)
    assert mfu(60_000, 6 * 1.3e9, peak_flops("unheard of")) is None
