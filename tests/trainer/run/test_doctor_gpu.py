"""What the doctor says of GPUs, from made-up readings; the products are tried for real in tests/gpu."""

import pytest
import torch

from stepline.trainer.run import doctor_gpu
from stepline.trainer.run.doctor_gpu import Gpu, check_driver, check_gpus, check_links, parse_topology

CPU = torch.device("cpu")
H100 = "NVIDIA H100 80GB HBM3"


def gpu(index: int = 0, name: str = H100, **changes) -> Gpu:
    values = {
        "memory_bytes": 85 * 10**9,
        "free_bytes": 84 * 10**9,
        "capability": (9, 0),
        "bf16": True,
        "peak_flops": 989e12,
    }
    return Gpu(index, name, **(values | changes))


@pytest.mark.parametrize(
    ("gpus", "ranks", "status", "words"),
    [
        ([gpu(0), gpu(1)], 2, "ok", "2 x NVIDIA H100 80GB HBM3 (85 GB, sm_90)"),
        ([gpu(0)], 2, "warning", "2 ranks would train on the CPU, start 1"),
        ([gpu(0), gpu(1, "A100", capability=(8, 0))], 2, "warning", "the slowest sets the pace"),
        ([gpu(free_bytes=45 * 10**9)], 1, "warning", "another program holds up to 40 GB of GPU 0"),
        ([gpu(name="V100", capability=(7, 0), bf16=False)], 1, "warning", "precision.compute=fp32"),
        ([gpu(name="H300", peak_flops=None)], 1, "ok", "no MFU for H300"),
        ([], 1, "missing", "training runs on the CPU"),
    ],
)
def test_gpus(gpus, ranks, status, words):
    check = check_gpus(gpus, ranks, present=bool(gpus))
    assert check.status == status
    assert words in check.says
    assert [value["index"] for value in check.value] == [g.index for g in gpus]


def test_a_gpu_that_torch_cannot_use_is_broken(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    check = check_gpus([], 1, present=True)
    assert (check.status, "install torch's CUDA build" in check.says) == ("broken", True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "CUDA_VISIBLE_DEVICES is '-1': unset it" in check_gpus([], 1, present=True).says
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")

    def no_driver():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "init", no_driver)
    assert "too old (found version 11040)): update the driver" in check_gpus([], 1, present=True).says


@pytest.mark.parametrize(
    ("driver", "built", "status"),
    [
        (12080, "12.8", "ok"),
        (13000, "12.8", "ok"),
        (12040, "12.8", "warning"),
        (11080, "12.1", "broken"),
        (None, "12.8", "missing"),
        (12080, None, "missing"),
    ],
)
def test_driver_against_torch(driver, built, status, monkeypatch):
    monkeypatch.setattr(doctor_gpu, "run_tool", lambda *command, **options: "550.54.15\n550.54.15")
    check = check_driver(driver, built)
    assert check.status == status
    assert ("driver 550.54.15 runs CUDA" in check.says) == (status != "missing")


TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m\n"
    "GPU0\t X \tNV18\tSYS\tPIX\t0-55\t0\n"
    "GPU1\tNV18\t X \tSYS\tNODE\t0-55\t0\n"
    "GPU2\tSYS\tSYS\t X \tSYS\t56-111\t1\n"
    "NIC0\tPIX\tNODE\tSYS\t X \n\nLegend:\n\n  X    = Self\n"
)


def test_links(monkeypatch):
    assert parse_topology(TOPOLOGY) == {(0, 1): "NV18", (0, 2): "SYS", (1, 2): "SYS"}
    assert parse_topology("") == {}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(doctor_gpu, "run_tool", lambda *command, **options: TOPOLOGY)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: 2 not in (a, b))
    check = check_links([gpu(0), gpu(1), gpu(2)])
    assert check.status == "warning"
    assert check.value == {"pairs": 3, "without_p2p": [[0, 2], [1, 2]], "links": ["NV18", "SYS"]}
    assert "1 of 3 pairs reach each other directly" in check.says
    assert check_links([gpu(0), gpu(1)]).status == "ok"
    assert check_links([gpu(0)]).status == "missing"


def test_fp8_products_are_really_tried(monkeypatch):
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        assert doctor_gpu.fp8_product_is_right(kind, CPU)
    real = torch._scaled_mm

    def wrong(*operands, **options):
        return real(*operands, **options) + 1

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_scaled_mm", wrong)
        assert not doctor_gpu.fp8_product_is_right(torch.float8_e4m3fn, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda", 0)
    works = {torch.float8_e4m3fn: True, torch.float8_e5m2: False}
    monkeypatch.setattr(doctor_gpu, "fp8_product_is_right", lambda kind, device: works[kind])
    check = doctor_gpu.check_fp8(cuda)
    assert (check.status, "E5M2 products are wrong" in check.says) == ("warning", True)
    works[torch.float8_e5m2] = True
    assert doctor_gpu.check_fp8(cuda).status == "ok"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check = doctor_gpu.check_fp8(cuda)
    assert (check.status, "sm_80" in check.says) == ("missing", True)
    assert doctor_gpu.check_fp8(CPU).status == "missing"


def test_sparse_products_are_really_tried(monkeypatch):
    """cuSPARSELt by a stand-in that takes what it takes: at most 2 of 4, and a column-major second operand."""

    def compress(dense):
        assert int((dense.float().view(128, 32, 4) != 0).sum(-1).max()) <= 2
        return dense

    def product(packed, dense, **options):
        assert dense.stride() == (1, 128)
        kind = options.get("out_dtype", packed.dtype)
        return (packed.double() @ dense.double()).to(kind)

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    for kind in (torch.bfloat16, torch.float8_e4m3fn):
        assert doctor_gpu.sparse_product_is_right(kind, CPU)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda *a, **o: product(*a, **o) * 2)
    assert not doctor_gpu.sparse_product_is_right(torch.bfloat16, CPU)

    def refused(kind, device):
        if kind == torch.float8_e4m3fn:
            raise RuntimeError("CUDA error: CUSPARSE_STATUS_NOT_SUPPORTED when calling `x`")
        return True

    monkeypatch.setattr(doctor_gpu, "sparse_product_is_right", refused)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(doctor_gpu, "loaded_version", lambda: 801)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check = doctor_gpu.check_sparse(torch.device("cuda", 0))
    assert check.status == "warning"
    assert check.value == {"version": 801, "works": ["bf16"]}
    assert "E4M3 (CUDA error: CUSPARSE_STATUS_NOT_SUPPORTED" in check.says
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    check = doctor_gpu.check_sparse(torch.device("cuda", 0))
    assert (check.status, check.value["works"]) == ("ok", ["bf16"])
