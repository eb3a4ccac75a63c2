"""The kernels of DeMo's chunks against the torch path, by Triton's interpreter."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("chunk_paths.py")
CASES = [*map(str, runpy.run_path(str(SCRIPT), run_name="cases")["CASES"]), "packing", "steps", "fallback"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What went wrong in each case, all run by one process."""
    out = tmp_path_factory.mktemp("chunks") / "out"
    command = [sys.executable, str(SCRIPT), str(out)]
    subprocess.run(command, check=True, env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=300)
    return torch.load(out)


@pytest.mark.parametrize("case", CASES)
def test_both_paths_send_and_decode_the_same(outcomes, case):
    assert outcomes[case] is None, outcomes[case]
