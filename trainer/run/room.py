"""Whether the disk has room for the checkpoints that a run will write."""

import math
import shutil

from stepline.trainer.config import Config
from stepline.trainer.plan.sync_memory import checkpoint_bytes
from stepline.trainer.plan.units import bytes_text
from stepline.trainer.run.folder import nearest_folder
from stepline.trainer.run.manifest import (
    SUPERSEDED,
    complete_checkpoints,
    incomplete_checkpoints,
    is_ephemeral,
    step_of,
    visible_checkpoints,
)


def permanent_to_come(config: Config, step: int) -> int:
    """Permanent checkpoints that are written after `step`: one every so many steps, and the last step's."""
    steps, every = config.total_steps(), config.checkpoint.every
    return max(0, -(-steps // every) - step // every)


def short_of_room(config: Config, world: int, step: int) -> list[str]:
    """A sentence where all checkpoints of a run that goes on from `step` do not fit on the disk of run.folder.

    What they take the place of is on the disk already: ephemeral checkpoints, and those that no longer count.
    """
    run, minutes, every = config.run.folder, config.checkpoint.ephemeral_minutes, config.checkpoint.every
    permanent = permanent_to_come(config, step)
    if not permanent:
        return []
    ephemeral = 0 if minutes is None or math.isinf(minutes) else config.checkpoint.keep
    try:
        there = nearest_folder(run / "checkpoints")
        free = shutil.disk_usage(there).free
        goes = [p for p in complete_checkpoints(run) if step_of(p) > step or is_ephemeral(p)]
        goes += visible_checkpoints(run, SUPERSEDED) + incomplete_checkpoints(run)
    except OSError:  # which whoever writes there says
        return []
    size = checkpoint_bytes(config, world)
    need, least = (size * (n + ephemeral + 1 - len(goes)) for n in (permanent, 1))
    if need <= free:
        return []
    others = f"{ephemeral} ephemeral ones and" if ephemeral else "and"
    first = "free some space" if least > free else f"raise checkpoint.every (now {every:,})"
    return [
        f"checkpoints will take about {bytes_text(need)} more, and {there} has {bytes_text(free)} free "
        f"({permanent:,} permanent of {bytes_text(size)} each, which all stay, {others} the one being written): "
        f"{first}, or put run.folder on another disk"
    ]
