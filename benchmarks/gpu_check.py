"""`make gpu-check`: the GPU tests, then the GPU benchmarks, a short table last. Needs one CUDA device.

NOT YET RUN ON A GPU.
"""

import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Exit code 0 when the tests pass; the benchmarks report whatever they measure."""
    if not torch.cuda.is_available():
        print("error: make gpu-check needs a CUDA device", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(HERE.parent / "tests" / "gpu")]
    code = subprocess.run(tests, check=False).returncode
    scripts = (
        "gpu_step.py",
        "moe_step.py",
        "memory.py",
        "activation_memory.py",
        "sparse_kernels.py",
        "sparse_step.py",
        "demo_codec.py",
    )
    for script in scripts:
        subprocess.run([sys.executable, str(HERE / script)], check=False)
    return code


if __name__ == "__main__":
    sys.exit(main())
