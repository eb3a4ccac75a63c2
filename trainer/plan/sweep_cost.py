"""What a sweep costs before it starts. Imports no torch."""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from stepline.trainer.plan.cost import asked_hardware
from stepline.trainer.plan.sweep import SweepRun
from stepline.trainer.watch.peaks import peak_flops

START_SECONDS = 4.0
"""What a run takes beside its steps and its validation: starting Python and torch, saving."""
ASSUMED_SHARE_OF_MATMUL = 0.3
"""Of a CPU's rate at large matrix products, what a small model's training reaches."""
MATMUL = """
import time, numpy
a = numpy.ones((512, 512), numpy.float32)
a @ a
best = 0
for _ in range(10):
    start = time.perf_counter()
    a @ a
    best = max(best, 2 * 512**3 / (time.perf_counter() - start))
print(best)
"""


@dataclass(frozen=True)
class Rate:
    """What one run computes in a second."""

    flops_per_second: float
    assumption: str
    """In words."""


@dataclass(frozen=True)
class SweepCost:
    """Of the runs that are still to be done."""

    runs: int
    tokens: int
    """Of training."""
    flops: float
    """Of training and of the validations."""
    seconds: float
    """Wall-clock time, so many runs at a time as asked for."""
    assumption: str
    """What the seconds rest on, in words."""


def run_seconds(run: SweepRun, flops_per_second: float) -> float:
    """What one run takes at a sustained rate, start included."""
    return START_SECONDS + (run.flops + run.eval_flops) / flops_per_second


def sweep_cost(runs: Sequence[SweepRun], rate: Rate, jobs: int) -> SweepCost:
    """The cost of these runs, `jobs` at a time."""
    seconds = [run_seconds(run, rate.flops_per_second) for run in runs]
    return SweepCost(
        len(runs),
        sum(run.steps * run.batch_tokens for run in runs),
        sum(run.flops + run.eval_flops for run in runs),
        max([sum(seconds) / jobs, *seconds], default=0.0),
        rate.assumption,
    )


def find_gpus() -> dict[str, str]:
    """What CUDA_VISIBLE_DEVICES calls each of the NVIDIA GPUs that may be used here, and its name."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "" or shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    names = told.stdout.splitlines() if told.returncode == 0 else []
    if visible is None or not names:
        return {str(i): name for i, name in enumerate(names)}
    # CUDA takes none from the first number on that is none, such as -1
    found = itertools.takewhile(lambda name: not name.startswith("-"), map(str.strip, visible.split(",")))
    return dict.fromkeys(found, names[0])


def find_rate(
    device: str | None, peak: float | None, mfu: float | None, ranks: int, threads: int, gpus: list[str]
) -> Rate:
    """The rate of one run on `ranks` ranks: of the named device, of this machine's GPU, or of `threads` cores.

    Raises UserError for an unknown device.
    """
    if device is None and peak is None and gpus and peak_flops(gpus[0]) is not None:
        device = gpus[0]
    machine = asked_hardware(device, peak, mfu, None)
    if machine is not None:
        told = f"{machine.peak:.3g} FLOP/s of {machine.device} at MFU {machine.mfu:g}"
        return Rate(
            machine.peak * machine.mfu * ranks, told + ("" if machine.measured else ", which is assumed")
        )
    measured = matmul_rate(threads)
    told = (
        f"{measured / 1e9:.0f} GFLOP/s, measured on matrix products of 512 x 512 (threads: {threads}), "
        f"of which a share of {ASSUMED_SHARE_OF_MATMUL:g} is assumed"
    )
    if gpus:
        told += f"; that is the CPU, for the peak of {gpus[0]} is not known: give --peak-flops"
    return Rate(measured * ASSUMED_SHARE_OF_MATMUL * ranks, told)


def matmul_rate(threads: int) -> float:
    """fp32 FLOP/s of this machine's matrix products with so many threads, measured in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    told = subprocess.run(
        [sys.executable, "-c", MATMUL], env=environment, capture_output=True, text=True, check=True
    )
    return float(told.stdout)
