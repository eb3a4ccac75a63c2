"""A sweep as a SLURM array: one element for each missing run. Imports no torch."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from stepline.trainer.files import write_whole
from stepline.trainer.plan.sweep import SweepRun
from stepline.trainer.run.slurm import directive, fill, hand_in, log_path, option_lines, template
from stepline.trainer.run.sweep_runs import SweepFolder


def array_of(indices: Sequence[int], at_once: int | None) -> str:
    """Indices in ascending order as `--array` wants them: `0-4,7%2`."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and parts[-1][1] == index - 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    text = ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
    return text if at_once is None else f"{text}%{at_once}"


def render(sweep: SweepFolder, runs: Sequence[SweepRun], at_once: int | None, options: str) -> str:
    """The batch script for these runs of the sweep; options: of sbatch, separated by blanks. Raises UserError."""
    indices = {run.name: i for i, run in enumerate(sweep.runs)}
    output = sweep.path.resolve()
    values = {
        "name": directive(f"sweep-{output.name}"),
        "array": array_of([indices[run.name] for run in runs], at_once),
        "here": directive(Path.cwd()),
        "log": log_path(output / "slurm", "%A-%a.log"),
        "options": option_lines(options),
        "python": shlex.quote(sys.executable),
        "output": shlex.quote(str(output)),
    }
    return fill(template("sweep.sbatch"), values)


def submit(sweep: SweepFolder, script: str) -> str:
    """Writes DIR/sweep.sbatch and hands it to SLURM; returns the job's id. Raises UserError."""
    return hand_in(write_script(sweep, script))


def write_script(sweep: SweepFolder, script: str) -> Path:
    """DIR/sweep.sbatch, and the folder of its logs (SLURM makes none)."""
    (sweep.path / "slurm").mkdir(parents=True, exist_ok=True)
    path = sweep.path / "sweep.sbatch"
    write_whole(path, script)
    return path
