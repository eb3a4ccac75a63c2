"""The CUDA paths of whole steps without a GPU, on fake tensors: shapes, types, devices, and where the host waits.

What kernels compute is not seen here: tests/gpu, and the Triton kernels by their interpreter.
"""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("fake_cuda")


@pytest.fixture(scope="module")
def guard(sh, unavailable, tmp_path_factory) -> Path:
    if shutil.which("g++") is None:
        unavailable("no g++")
    target, torch = tmp_path_factory.mktemp("guard") / "guard.so", Path(find_spec("torch").origin).parent
    libraries = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
    compiler = ["g++", "-std=c++20", "-O0", "-fPIC", "-shared", f"-I{torch / 'include'}"]
    sh(*compiler, FOLDER / "guard.cpp", "-o", target, *libraries)
    return target


@pytest.mark.parametrize(("ranks", "cases"), [(1, 20), (4, 12)])
def test_steps_on_fake_gpus(sh, guard, ranks, cases):
    """One rank with everything, and the first of four under FSDP2, HSDP and the synchronisers.

    No step waits for the device, but where a packet must not leave with what is skipped.
    """
    done = sh(sys.executable, FOLDER / "steps.py", ranks, LD_PRELOAD=str(guard))
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["error"] for row in rows if "error" in row] == []
    assert len(rows) == cases
    waits = {row["case"]: row["waits"] for row in rows if row["waits"]}
    asked = ["demo, late", "demo, owners", "demo", "random-k"] if ranks > 1 else []
    assert waits == {name: [f"{'random_k' if name == 'random-k' else 'demo'}.py step"] for name in asked}
