"""What one rank cannot do, none goes on without."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from stepline.comm.gather import gathered
from stepline.trainer.errors import UserError

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
