"""The folder that `stepline prepare` builds in: for one process at a time, gone on with after a kill."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stepline.trainer.data.parts import write_json
from stepline.trainer.errors import UserError
from stepline.trainer.files import NoLocks, locked

TOKENIZER_NAME = "tokenizer-name.json"  # while building: names the file or sub-folder of the tokenizer


OURS = ("lock", "request.json", "meta.json")
"""One of them is in every folder that `prepare` builds in."""


class Refused(UserError):
    """All is done and of no use: the same call would do the same again."""


def check_ours(partial: Path) -> None:
    """Raises UserError for a folder of that name which somebody else has filled."""
    if any(partial.iterdir()) and not any((partial / name).exists() for name in OURS):
        raise UserError(f"{partial} would be written and holds something else; choose another --output")


@contextmanager
def only_one(partial: Path) -> Iterator[None]:
    """Keep a second `prepare` out of the same folder."""
    with ExitStack() as held:
        try:
            mine = held.enter_context(locked(partial / "lock", wait=False))
        except NoLocks:  # nothing is left there
            if [path.name for path in partial.iterdir()] == ["lock"]:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if mine is None:
            raise UserError(f"another `stepline prepare` is writing {partial}; wait for it")
        yield


@contextmanager
def removed_when_useless(partial: Path, trains: bool) -> Iterator[None]:
    """Leaves no folder behind after an error that came before anything that the same call could go on with.

    trains: a tokenizer in the folder is a new one, which takes minutes.
    """
    try:
        yield
    except (UserError, OSError) as error:
        parts = (partial / "joined.json").exists() or any((partial / "parts").glob("[0-9]*.json"))
        trained = trains and (partial / TOKENIZER_NAME).exists()
        trained |= (partial / "meta.json").exists()
        if isinstance(error, Refused) or not (parts or trained):
            shutil.rmtree(partial, ignore_errors=True)
        raise


def start_or_resume(partial: Path, request: str) -> None:
    """Keep what a killed run of the same request left; clear anything else."""
    marker = partial / "request.json"
    if not (marker.exists() and json.loads(marker.read_text()) == request):
        for path in partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        write_json(marker, request)
    parts = partial / "parts"
    parts.mkdir(exist_ok=True)
    for path in parts.glob("*.*.*.*"):  # INDEX.PID.SPLIT.KIND: a part that was being written
        path.unlink()
