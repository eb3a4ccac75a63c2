"""One attempt of a run in a SLURM job: runs the launchers, then requeues the job where the run is to go on.

torchrun exits with 1 whatever its ranks say, so how the attempt ended is read in the run's folder. The job is
requeued only where that brings the run further: never twice for one attempt, never for ever. Imports no torch.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stepline.trainer.errors import DONE, FAILED, STATUS, TO_BE_CONTINUED, USER_ERROR
from stepline.trainer.run.manifest import COMPLETE, complete_checkpoints
from stepline.trainer.run.outcome import read_outcome

PAUSES_S = (0, 5, 15, 30)
"""Before each try to reach SLURM's controller, which may be away for a moment."""


@dataclass(frozen=True)
class Verdict:
    """What becomes of the job."""

    exit_code: int
    why: str
    requeue: bool = False


def decide(code: int, outcome: dict, further: bool, preempted: bool) -> Verdict:
    """What becomes of the job after an attempt.

    code: of the launchers; outcome: what this attempt wrote, empty where it did not come so far; further: whether it
    has completed a checkpoint; preempted: whether SLURM is about to take the nodes away.
    """
    status, message = outcome.get("status"), outcome.get("message", "")
    if code == 0 or status == STATUS[DONE]:
        return Verdict(DONE, "done")
    if status == STATUS[USER_ERROR]:
        return Verdict(outcome["exit_code"], f"stopped: {message}")
    if status == STATUS[TO_BE_CONTINUED] and (further or preempted):
        return Verdict(TO_BE_CONTINUED, message, requeue=True)
    if status == STATUS[TO_BE_CONTINUED]:
        return Verdict(FAILED, f"{message}; it has come no further than the attempt before: raise --time")
    if outcome.get("diverged") and not further:  # at the same place as before
        return Verdict(outcome["exit_code"], f"diverged: {message}")
    failed = f"failed: {message or f'the launchers ended with code {code}'}"
    if preempted:
        return Verdict(TO_BE_CONTINUED, f"{failed}, while SLURM preempted the job", requeue=True)
    if further:
        return Verdict(TO_BE_CONTINUED, f"{failed}; it goes on from its last checkpoint", requeue=True)
    return Verdict(code, f"{failed}; it has completed no checkpoint and is not tried again")


def saved(run: Path) -> set[tuple[str, int]]:
    """The complete checkpoints, each with the time of its completion."""
    found = set()
    for path in complete_checkpoints(run):
        try:
            found.add((path.name, (path / COMPLETE).stat().st_mtime_ns))
        except OSError:  # just removed for a newer one
            continue
    return found


def outcome_of(run: Path, attempt: str) -> dict:
    """The content of outcome.json where this attempt wrote it, and not a start that was refused; torchrun's ranks know
    the attempt by its id."""
    outcome = read_outcome(run)
    mine = (outcome.get("launcher") or {}).get("run_id") == attempt and outcome.get("attempt") is not None
    return outcome if mine else {}


def mistake_in(log: Path) -> str:
    """The sentence with which a rank has refused to start, or an empty text."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"^(?:\d+: )?error: (.+)$", text, re.MULTILINE)  # srun --label puts the task before it
    return found[1] if found else ""


def job_state(job: str) -> dict[str, str]:
    """Fields of `scontrol show job`; raises OSError where SLURM does not answer."""
    told = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True, check=False
    )
    if told.returncode != 0:
        raise OSError(told.stderr.strip())
    return dict(word.split("=", 1) for word in told.stdout.split() if "=" in word)


def is_preempted(job: str) -> bool:
    """Whether the job is in the time that SLURM leaves it before it takes its nodes."""
    try:
        return job_state(job).get("PreemptTime", "None") not in ("None", "N/A", "Unknown")
    except OSError:
        return False


def requeue(job: str, pauses: Sequence[float] = PAUSES_S) -> str:
    """Puts a running job back into the queue; returns why not, or an empty text.

    A job that somebody has cancelled, or that SLURM is requeueing already, is left as it is.
    """
    problem = ""
    for pause in pauses:
        time.sleep(pause)
        try:
            state = job_state(job).get("JobState")
        except OSError as error:
            problem = str(error)
            continue
        if state != "RUNNING":
            return f"it is {state}"
        told = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        if told.returncode == 0:
            return ""
        problem = told.stderr.strip()
    return problem.replace("\n", " ") or "scontrol says no reason"


def say(text: str) -> None:
    """A line of the job's log; on a full disk it is lost, and nothing else."""
    with contextlib.suppress(
        OSError
    ):  # past Python's buffer, which at the exit would be tried again, and fail
        os.write(1, f"{time.strftime('%F %T')} {' '.join(text.split())}\n".encode())


def main(arguments: Sequence[str]) -> int:
    """Runs the command after `--` and sees to the job; returns the exit code of the batch script."""
    parser = argparse.ArgumentParser(prog="python -m stepline.trainer.run.requeue", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--attempt", required=True, help="id of the rendezvous: JOB-ATTEMPT")
    parser.add_argument("--log", type=Path, required=True, help="where the launchers' output goes")
    parser.add_argument("command", nargs="+")
    ask = parser.parse_args(arguments)

    # Meant for the ranks; `scancel --batch` or `--full` sends it here as well.
    signal.signal(signal.SIGUSR1, lambda *_: None)
    before = saved(ask.run)
    with ask.log.open("a", encoding="utf-8") as log:
        code = subprocess.call(ask.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    job = ask.attempt.rpartition("-")[0]
    outcome = outcome_of(ask.run, ask.attempt) or {"message": mistake_in(ask.log)}
    verdict = decide(code, outcome, bool(saved(ask.run) - before), code != 0 and is_preempted(job))
    if verdict.requeue:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which SLURM ends a job that is requeued
        problem = requeue(job)  # first: the log may be on a disk that hangs
        say(verdict.why)
        say(f"job {job} is not requeued: {problem}" if problem else f"job {job} is requeued")
    else:
        say(verdict.why)
    return verdict.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
