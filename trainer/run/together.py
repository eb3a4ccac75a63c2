"""What one rank cannot do, none goes on without."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from stepline.comm.gather import gathered
from stepline.trainer.errors import UserError, reason_of

Value = TypeVar("Value")


def together(action: Callable[[], Value], group: dist.ProcessGroup | None = None) -> Value:
    """What `action` gives this rank; where it raises a UserError on one, that is raised on all. A collective."""
    value = problem = None
    try:
        value = action()
    except UserError as error:
        problem = str(error)
    if problems := [one for one in gathered(problem, group) if one is not None]:
        raise UserError(problems[0])
    return value


def together_on_disk(
    action: Callable[[], Value], folder: Path, group: dist.ProcessGroup | None = None
) -> Value:
    """`together` for work on files in `folder`: an OSError is a UserError that names the path."""

    def careful() -> Value:
        try:
            return action()
        except OSError as error:
            what = f"{error.filename or folder} cannot be used ({reason_of(error)})"
            raise UserError(f"{what}; mend that and start the same command again") from error

    return together(careful, group)
