"""Peaks by exact device name, and MFU."""

import pytest

from stepline.trainer.errors import UserError
from stepline.trainer.plan.cost import hardware
from stepline.trainer.watch.peaks import mfu, peak_flops, plain_names


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("a100", 312),
        ("H100 SXM", 989),
        ("h100 pcie", 756),
        ("V100 SXM2", 125),
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


def test_each_plain_name_is_known_and_is_no_other_device():
    assert all(peak_flops(name) for name in plain_names())
    assert {"A100", "H100 SXM", "H100 PCIe", "H200"} <= set(plain_names())
    assert len(set(plain_names())) == len(plain_names())


def test_a_name_that_several_kinds_share():
    with pytest.raises(UserError, match="of H100 differ; give one of H100 SXM, H100 PCIe, H100 NVL"):
        hardware("H100", None, None)
    with pytest.raises(UserError, match="not known; give --peak-flops, or one of A100, H100 SXM"):
        hardware("H101", None, None)


def test_mfu():
    # 1.3B parameters, 6 N FLOPs a token, 60k tokens/s on one H200
    assert mfu(60_000, 6 * 1.3e9, peak_flops("NVIDIA H200")) == pytest.approx(0.47320525)
    assert mfu(60_000, 6 * 1.3e9, peak_flops("unheard of")) is None
