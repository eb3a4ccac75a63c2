"""`stepline doctor` on a GPU: what it tries for real, against what torch says of the device."""

import json

import pytest
import torch

from stepline.trainer.run.doctor import run_doctor
from stepline.trainer.watch.peaks import peak_flops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_doctor_tries_nccl_fp8_and_sparse_products(capsys, tmp_path):
    code = run_doctor(str(tmp_path), as_json=True)
    report = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in report["checks"]}
    assert code == 0, [check["says"] for check in report["checks"] if check["status"] == "broken"]
    first = checks["gpus"]["value"][0]
    assert first["name"] == torch.cuda.get_device_name(0)
    assert tuple(first["capability"]) == torch.cuda.get_device_capability(0)
    assert first["peak_flops"] == peak_flops(first["name"])
    if "H200" in first["name"]:
        assert first["peak_flops"] == 989e12
    assert checks["nccl"]["value"] == {
        "version": ".".join(map(str, torch.cuda.nccl.version())),
        "works": True,
    }
    assert checks["driver"]["value"]["torch_cuda"] == torch.version.cuda
    if torch.cuda.get_device_capability(0) >= (8, 9):
        assert checks["fp8"]["value"] == ["E4M3", "E5M2"], checks["fp8"]["says"]
    if torch.backends.cusparselt.is_available() and torch.cuda.get_device_capability(0) >= (8, 0):
        assert "bf16" in checks["2:4 sparsity"]["value"]["works"], checks["2:4 sparsity"]["says"]
