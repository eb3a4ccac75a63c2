"""A sweep as a SLURM array: one element for each missing run. Imports no torch."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from stepline.trainer.errors import UserError
from stepline.trainer.plan.sweep import SweepRun
from stepline.trainer.run.sweep_runs import SweepFolder, write_whole

SCRIPT = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array={array}
#SBATCH --chdir={here}
#SBATCH --output={logs}/%A-%a.log
#SBATCH --ntasks=1
# A minute before the time limit the run is ended cleanly, and counts as not done.
#SBATCH --signal=B:TERM@60
{options}
exec {python} -m stepline.trainer sweep --output {output} --only "$SLURM_ARRAY_TASK_ID"
"""


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
    """The batch script for these runs of the sweep; options: of sbatch, separated by blanks."""
    indices = {run.name: i for i, run in enumerate(sweep.runs)}
    output = sweep.path.resolve()
    try:
        extra = shlex.split(options)
    except ValueError as error:
        raise UserError(f"--sbatch '{options}' cannot be read: {error}") from None
    for option in extra:
        if not option.startswith("--"):
            raise UserError(f"--sbatch has '{option}'; write options as --name=value")
    return SCRIPT.format(
        name=f"sweep-{output.name}",
        array=array_of([indices[run.name] for run in runs], at_once),
        here=Path.cwd(),
        logs=output / "slurm",
        options="".join(f"#SBATCH {option}\n" for option in extra),
        python=shlex.quote(sys.executable),
        output=shlex.quote(str(output)),
    )


def find_sbatch() -> str:
    """The submit command; raises UserError on a machine without it."""
    found = shutil.which("sbatch")
    if found is None:
        raise UserError("there is no sbatch on this machine; run it where SLURM is, or take --print")
    return found


def submit(sweep: SweepFolder, script: str) -> str:
    """Writes DIR/sweep.sbatch and hands it to SLURM; returns the job's id. Raises UserError."""
    sbatch = find_sbatch()
    path = write_script(sweep, script)
    told = subprocess.run([sbatch, "--parsable", str(path)], capture_output=True, text=True, check=False)
    if told.returncode != 0:
        reason = (told.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"sbatch refused {path}: {reason}")
    return told.stdout.strip().split(";")[0]


def write_script(sweep: SweepFolder, script: str) -> Path:
    """DIR/sweep.sbatch, and the folder of its logs (SLURM makes none)."""
    (sweep.path / "slurm").mkdir(parents=True, exist_ok=True)
    path = sweep.path / "sweep.sbatch"
    write_whole(path, script)
    return path
