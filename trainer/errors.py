"""How a run ends: exit codes, and errors that a user can mend (one sentence, exit code 2, no traceback)."""

import difflib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from stepline.comm import slurm

DONE, FAILED, USER_ERROR, TO_BE_CONTINUED = 0, 1, 2, 75
"""Exit codes of a run."""
STATUS = {DONE: "done", FAILED: "failed", USER_ERROR: "stopped", TO_BE_CONTINUED: "continue"}
"""What outcome.json calls them."""


class UserError(Exception):
    """A mistake in a command, a config or an input; its text says in one sentence what to change."""


class DoesNotFit(UserError):
    """A step needs more memory than a device has."""


class Unreadable(UserError):
    """A file cannot be read now (a mount, rights, a disk), which says nothing of what it holds."""

    def __init__(self, path: Path | str, error: OSError) -> None:
        why = error.strerror or type(error).__name__
        super().__init__(f"{path} cannot be read ({why}); mend that and start the same command again")


def mistake_of(error: UserError | OSError) -> UserError:
    """A user's mistake as it is, and what the system refuses to do with a file as a sentence; raises the error itself
    where it is of no file."""
    if isinstance(error, UserError):
        return error
    if error.filename is None:
        raise error
    return UserError(f"{error.filename}: {error.strerror}; mend that and start the same command again")


def speaks() -> bool:
    """Whether this process says a user's mistake: until the ranks meet all find the same, and one of each node says it.

    By torchrun's variables, or srun's. Once there is a process group a mistake may be one rank's own: all speak.
    """
    dist = sys.modules.get("torch.distributed")  # torch is not imported for this
    if dist is not None and dist.is_available() and dist.is_initialized():
        return True
    if slurm.is_rank():
        return int(os.environ["SLURM_LOCALID"]) == 0
    local, size = os.environ.get("LOCAL_RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    size = os.environ.get("LOCAL_WORLD_SIZE", size)
    if not local.isdecimal():
        return True
    # what has a place that does not exist, such as a shell with a rank's leftover, is nobody's neighbour
    return int(local) == 0 or (size.isdecimal() and int(local) >= int(size))


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the most similar of `words`, or an empty string when none is near."""
    match = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


class TrainingStopped(Exception):
    """The run ended itself on all ranks (too many skipped steps): one sentence, exit code 1.

    diverged: steps were skipped for what came out of them; more of the same is likely to lead there again.
    """

    def __init__(self, sentence: str, *, diverged: bool = False) -> None:
        super().__init__(sentence)
        self.diverged = diverged


class ToBeContinued(Exception):
    """The run was told to stop and has saved, on all ranks: one sentence, exit code 75.

    told: the launchers (`StopSignal.launcher`) whose ranks have received a signal, and how often each had started its
        ranks again.
    """

    def __init__(self, sentence: str, told: dict[str, int]) -> None:
        super().__init__(sentence)
        self.told = told


def first_line(error: BaseException) -> str:
    """Of an error's text, which may be long or empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def reason_of(error: BaseException) -> str:
    """What the system says of a file's error, or the first line of another."""
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
