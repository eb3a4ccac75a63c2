"""How an attempt ended: outcome.json. Imports no torch."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from stepline.trainer.errors import DONE, STATUS, TO_BE_CONTINUED, USER_ERROR
from stepline.trainer.files import write_whole
from stepline.trainer.watch.metrics import finite_row

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
    if read_outcome(folder).get("status") != STATUS[DONE] and not _before_restart(folder):
        _write(folder, None, USER_ERROR, {"message": message})


def _write(folder: Path, attempt: int | None, exit_code: int, more: dict[str, Any]) -> None:
    outcome = finite_row({"status": STATUS[exit_code], "exit_code": exit_code, "attempt": attempt, **more})
    try:
        write_whole(folder / "outcome.json", json.dumps(outcome | {"launcher": _launcher()}, indent=2) + "\n")
    except OSError as error:
        log.error("outcome.json cannot be written (%s): %s", error.strerror, outcome)


def told_launchers(folder: Path) -> list[str]:
    """Where this process is a restart, by torchrun, of ranks that have saved: the launchers whose ranks were told to.

    torchrun takes exit code 75 of its ranks for a failure. While one of these launchers is still there, the run stays
    stopped; once they have left an elastic launch, it goes on without them.
    """
    outcome = _before_restart(folder)
    return outcome.get("told", []) if outcome.get("status") == STATUS[TO_BE_CONTINUED] else []


def diverged_before(folder: Path) -> str | None:
    """Where this process is a restart, by torchrun, of a run that diverged, as it would again: what that one said."""
    outcome = _before_restart(folder)
    return outcome["message"] if outcome.get("diverged") else None


def _before_restart(folder: Path) -> dict[str, Any]:
    """What the ranks said that this same launch has started before; empty where this is no restart."""
    outcome, now = read_outcome(folder), _launcher()
    before = outcome.get("launcher") or {}
    again = now and before.get("run_id") == now["run_id"] and now["restarts"] > before.get("restarts", 0)
    return outcome if again else {}


def forget_outcome(folder: Path) -> None:
    """A new attempt begins: what the one before said is not said of this one."""
    (folder / "outcome.json").unlink(missing_ok=True)


def started_again() -> bool:
    """Whether torchrun or SLURM has started this command before, in the same job."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(os.environ.get(name, "0") not in ("", "0") for name in counts)


def _launcher() -> dict[str, Any] | None:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return {"run_id": os.environ["TORCHELASTIC_RUN_ID"], "restarts": restarts}
