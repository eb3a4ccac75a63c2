"""DeMo's kernels on CUDA against the torch path there, and a step by them against one on the CPU.

NOT YET RUN ON A GPU.
"""

import runpy
from pathlib import Path

import pytest
import torch

from stepline.trainer.run.synchronize import chunk_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


PATHS = runpy.run_path(str(Path(__file__).parents[1] / "comm" / "chunk_paths.py"), run_name="cases")


@pytest.fixture(scope="module")
def paths():
    return PATHS


@pytest.mark.parametrize("case", PATHS["CASES"], ids=str)  # each compiles kernels of its own
def test_both_paths_send_and_decode_the_same(paths, case):
    paths["check"](case, "cuda")


def test_more_chunks_than_programs(paths):
    paths["check"](paths["Case"](((4096, 4096),), 32, "sign"), "cuda")


def test_what_the_kernels_do_not_support_goes_through_torch(paths):
    paths["check_fallback"]("cuda")


def test_packing_is_that_of_torch(paths):
    paths["check_packing"]("cuda")


def test_steps_are_those_of_the_cpu_and_every_run_the_same_bits(paths):
    paths["check_steps"]("cuda")
    kernels = chunk_kernels(torch.device("cuda"))
    runs = [paths["steps"]("cuda", kernels, 512, 3, codec="sign") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
