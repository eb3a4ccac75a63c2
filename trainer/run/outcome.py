"""How an attempt ended: outcome.json. Imports no torch."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from stepline.trainer.errors import DONE, STATUS, TO_BE_CONTINUED, USER_ERROR
from stepline.trainer.files import write_whole
from stepline.trainer.watch.metrics import finite_row

BEGUN = ".begun.json"
"""In a run's folder: the launch that trains there."""

log = logging.getLogger("stepline")


def read_outcome(folder: Path) -> dict[str, Any]:
    """The content of outcome.json; empty where there is none, as while an attempt lasts."""
    try:
        return dict(json.loads((folder / "outcome.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def write_outcome(folder: Path, attempt: int, exit_code: int, **more: Any) -> None:
    """Says in outcome.json how an attempt ended; where ranks fail one after the other, the first one's word stays."""
    if read_outcome(folder).get("attempt") != attempt:
        _write(folder, attempt, exit_code, more)


def write_refusal(folder: Path, message: str) -> None:
    """Says in outcome.json that a start was refused before it became an attempt. That the run is done stays, and what
    the launch that starts it again has said of it."""
    outcome, now = read_outcome(folder), _launcher()
    again = now and now["restarts"] and (outcome.get("launcher") or {}).get("run_id") == now["run_id"]
    if outcome.get("status") != STATUS[DONE] and not again:
        _write(folder, None, USER_ERROR, {"message": message})


def _write(folder: Path, attempt: int | None, exit_code: int, more: dict[str, Any]) -> None:
    outcome = finite_row({"status": STATUS[exit_code], "exit_code": exit_code, "attempt": attempt, **more})
    try:
        write_whole(folder / "outcome.json", json.dumps(outcome | {"launcher": _launcher()}, indent=2) + "\n")
    except OSError as error:
        log.error("outcome.json cannot be written (%s): %s", error.strerror, outcome)


def told_before(folder: Path, launcher: str) -> bool:
    """Whether this process is a restart, by torchrun, of a rank that was told to stop and has saved.

    torchrun takes exit code 75 of its ranks for a failure. While the launcher of one that was told is still there, the
    run stays stopped; once it has left an elastic launch, the run goes on without it. A node that comes has all agents
    stop their ranks too, and start them again without a restart that counts.
    """
    outcome = read_outcome(folder)
    left = outcome.get("status") == STATUS[TO_BE_CONTINUED]
    return left and _restarted(outcome, outcome.get("told"), launcher)


def diverged_before(folder: Path, launcher: str) -> str | None:
    """Where this process is a restart, by torchrun, of a run that diverged, as it would again: what that one said."""
    outcome = read_outcome(folder)
    again = outcome.get("diverged") and _restarted(outcome, outcome.get("launched_by"), launcher)
    return outcome["message"] if again else None


def _restarted(outcome: dict[str, Any], counts: Any, launcher: str) -> bool:
    """Whether this launcher has started its ranks again since: agents of torchrun count each for itself."""
    now, before = _launcher(), outcome.get("launcher") or {}
    known = isinstance(counts, dict) and launcher in counts
    return bool(
        now and known and before.get("run_id") == now["run_id"] and now["restarts"] > counts[launcher]
    )


def restarts() -> int:
    """How often torchrun's agent has started this rank again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def forget_outcome(folder: Path) -> None:
    """A new attempt begins: what the one before said is not said of this one."""
    (folder / "outcome.json").unlink(missing_ok=True)


def note_begun(folder: Path, launchers: list[str]) -> None:
    """Keeps who has begun to train in `folder`, where --resume said: started again, they go on from there."""
    begun = {"launchers": launchers, "job": os.environ.get("SLURM_JOB_ID"), "requeues": _requeues()}
    write_whole(folder / BEGUN, json.dumps(begun) + "\n")


def begun_before(folder: Path, launcher: str) -> bool:
    """Whether torchrun's agent, or SLURM in the same job, has started this command before, and that has begun."""
    try:
        begun = dict(json.loads((folder / BEGUN).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False
    job = os.environ.get("SLURM_JOB_ID")
    requeued = job is not None and begun.get("job") == job and _requeues() > begun.get("requeues", 0)
    return requeued or ("TORCHELASTIC_RUN_ID" in os.environ and launcher in begun.get("launchers", ()))


def _requeues() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _launcher() -> dict[str, Any] | None:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return {"run_id": os.environ["TORCHELASTIC_RUN_ID"], "restarts": restarts()}
