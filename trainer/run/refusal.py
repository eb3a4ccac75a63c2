"""What a run's folder says of a start that was refused. Imports no torch."""

import contextlib
import re
from pathlib import Path

from stepline.trainer.config_io import find_base, find_config, load_config
from stepline.trainer.config_types import with_home
from stepline.trainer.config_yaml import parse_overrides, read_yaml
from stepline.trainer.errors import USER_ERROR, UserError
from stepline.trainer.run.lock import unless_held
from stepline.trainer.run.outcome import write_refusal
from stepline.trainer.watch import heartbeat


def note_refusal(config: str, overrides: list[str], why: UserError, launcher: str | None = None) -> None:
    """outcome.json and heartbeat.json of the run say that it is stopped, so that whoever repeats a command until it is
    done does not go on for ever, and whoever watches looks.

    Only where the run has had an attempt, and while no process trains in its folder. launcher: torchrun's agent, of a
    rank that was refused before ranks have met: where its rank 0 holds the folder it waits for this one in vain. Raises
    nothing.
    """
    with contextlib.suppress(UserError, OSError, ValueError):
        folder = _folder(config, overrides)
        if not any((folder / "logs").glob("attempt-*")):
            return
        with unless_held(folder, launcher) as free:
            if free:
                write_refusal(folder, str(why))
                heartbeat.end(folder, USER_ERROR)


def _folder(config: str, overrides: list[str]) -> Path:
    """The run's folder, also where the mistake is in another part of the command or of its file. Raises UserError, and
    ValueError for a home that is not known."""
    try:
        return load_config(config, overrides)[0].run.folder
    except UserError:
        own = [override for override in overrides if override.startswith("run.folder=")]
        if own:
            return Path(with_home(str(parse_overrides(own)["run.folder"])))
        path = find_config(config)
        return Path(with_home(_written(path) or Path("runs") / path.stem))


def _written(path: Path, may_build: bool = True) -> str | None:
    """run.folder as a config file or its base has it, whatever else is wrong with them. Raises UserError."""
    try:
        content = read_yaml(path)
    except UserError:  # no sections at all, as where a bracket is missing
        found = re.search(r"\bfolder: *([^\s#,}]+)", path.read_text(encoding="utf-8", errors="replace"))
        return found and found[1].strip("'\"")
    run, base = content.get("run"), content.get("base")
    folder = run.get("folder") if isinstance(run, dict) else None
    if folder is None and base is not None and may_build:
        return _written(find_base(str(base), path), may_build=False)
    return None if folder is None else str(folder)
