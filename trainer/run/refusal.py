"""What a run's folder says of a start that was refused. Imports no torch."""

import contextlib
from pathlib import Path

from stepline.trainer.config_io import load_config, parse_overrides
from stepline.trainer.errors import USER_ERROR, UserError
from stepline.trainer.files import locked
from stepline.trainer.run.outcome import write_refusal
from stepline.trainer.watch import heartbeat

LOCK = ".training.lock"
"""In a run's folder: held while a process trains there."""


def note_refusal(config: str, overrides: list[str], why: UserError) -> None:
    """outcome.json and heartbeat.json of the run say that it is stopped, so that whoever repeats a command until it is
    done does not go on for ever, and whoever watches looks.

    Only where the run has had an attempt, and while no process trains in its folder. Raises nothing.
    """
    with contextlib.suppress(UserError, OSError):
        folder = _folder(config, overrides)
        if not any((folder / "logs").glob("attempt-*")):
            return
        with locked(folder / LOCK, wait=False) as mine:
            if mine is not None:
                write_refusal(folder, str(why))
                heartbeat.end(folder, USER_ERROR)


def _folder(config: str, overrides: list[str]) -> Path:
    """The run's folder, also where the mistake is in another part of the command. Raises UserError."""
    try:
        return load_config(config, overrides)[0].run.folder
    except UserError:
        own = [override for override in overrides if override.startswith("run.folder=")]
        if not own:
            return load_config(config)[0].run.folder
        return Path(str(parse_overrides(own)["run.folder"]))
