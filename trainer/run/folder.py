"""A run's folder: whether it can be used, and where the run in it goes on. Imports no torch."""

import os
import shutil
import tempfile
from pathlib import Path

from stepline.trainer.errors import Unreadable, UserError, nearest
from stepline.trainer.run.manifest import (
    complete_checkpoints,
    damaged,
    damaged_checkpoints,
    damages,
    incomplete_checkpoints,
    none_left,
    passed_over,
    step_of,
)

RUN_MARKS = ("config.yaml", "logs", "checkpoints", "metrics.jsonl", "run_id")
"""One of them makes a folder a run's."""
TOKENIZER = "tokenizer"
"""Folder in a run's: a copy of its data's tokenizer."""
LAUNCHER_FILES = (".log", ".out", ".err")
"""What a shell or a scheduler may put into a run's folder before the run begins."""


def check_folder(folder: Path) -> None:
    """Raises UserError where a run cannot keep its files in `folder`; makes nothing."""
    try:
        if folder.exists():
            names = [path.name for path in folder.iterdir()]  # raises NotADirectoryError
            foreign = [n for n in names if not n.startswith(".") and not n.endswith(LAUNCHER_FILES)]
            if foreign and not any(name in RUN_MARKS for name in names):
                raise UserError(
                    f"{folder} holds other things than a run ({min(foreign)}); choose a new or empty run.folder"
                )
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise _unusable(folder, f"{there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise _unusable(folder, f"{there} is not writable")
    except OSError as error:
        raise _unusable(folder, error.strerror) from error


def nearest_folder(folder: Path) -> Path:
    """The folder, or its nearest parent that is there: what `mkdir -p` would build on."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))


def make_folder(folder: Path) -> None:
    """Makes the run's folder and tries whether files can be written there; raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, prefix="."):  # hidden from the check_folder of another rank
            pass
    except OSError as error:
        raise _unusable(folder, error.strerror) from error


def keep_tokenizer(folder: Path, tokenizer: Path, fresh: bool) -> None:
    """Copies the data's tokenizer, a file or a folder, into the run's folder: the run is used where its data is not.

    fresh: the run begins; what an attempt without a checkpoint has left may be of other data.
    """
    kept, partial = folder / TOKENIZER, folder / f".{TOKENIZER}"
    if kept.exists() and not fresh:
        return
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        copy = shutil.copytree if tokenizer.is_dir() else shutil.copyfile
        copy(tokenizer, partial / tokenizer.name)
        shutil.rmtree(kept, ignore_errors=True)
        partial.rename(kept)
    except OSError as error:
        raise _unusable(folder, error.strerror) from error


def _unusable(folder: Path, reason: str) -> UserError:
    return UserError(f"run.folder {folder} cannot be used ({reason}); choose another run.folder")


def checkpoint_to_resume(folder: Path, resume: str) -> tuple[Path | None, list[str]]:
    """Where to go on, and what was passed over. Sizes and small files are checked here, the rest by all together."""
    kept = folder / "checkpoints"
    try:
        if kept.exists():
            os.listdir(kept)  # which a search by pattern takes for empty where it must not be read
        found = complete_checkpoints(folder)
    except OSError as error:
        raise Unreadable(kept, error) from error
    if resume == "never":
        if found or damaged_checkpoints(folder):
            raise UserError(
                f"{folder} holds a run already; choose another run.folder or resume it (--resume auto)"
            )
        return None, []
    if resume == "auto":
        return _newest_sound(folder, found)
    path = Path(resume)
    same = [p for p in found if resume == p.name or p.resolve() == path.resolve()]
    if not same:
        modes = nearest(resume, ("auto", "never")) if len(path.parts) == 1 else ""
        raise UserError(
            f"{path} is no complete checkpoint of {folder}; it has "
            f"{', '.join(p.name for p in found) or 'none'}{modes}"
        )
    problems = damages(same[0], checksums=False)
    if problems:
        raise damaged(same[0], problems[0])
    return same[0], []


def _newest_sound(folder: Path, found: list[Path]) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint with all its files; names the newer ones that are damaged or incomplete."""
    notes = []
    for path in reversed(found):
        problems = damages(path, checksums=False)
        if not problems:
            late = [p.name for p in incomplete_checkpoints(folder) if step_of(p) > step_of(path)]
            if late:
                notes.append(f"{', '.join(late)} was not finished: {path.name} is used")
            return path, notes
        notes.append(passed_over(path, problems[0]))
    if found:
        raise none_left(path, problems[0])
    if marked := damaged_checkpoints(folder):
        raise none_left(marked[-1], "it was found so before")
    return None, notes
