"""Whether the disk has room for the checkpoints that a run will write."""

import shutil

from stepline.trainer.config import Config
from stepline.trainer.plan.sync_memory import checkpoint_bytes
from stepline.trainer.plan.units import bytes_text
from stepline.trainer.run.checkpoint import SPARE_BYTES
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
    return 0 if step >= steps else -(-steps // every) - step // every


def short_of_room(config: Config, world: int, step: int) -> list[str]:
    """A sentence where the permanent checkpoints of a run that goes on from `step` do not fit on the disk of
    run.folder, once all that makes way for them has: ephemeral ones, and those that no longer count."""
    run, every = config.run.folder, config.checkpoint.every
    permanent = permanent_to_come(config, step)
    if not permanent:
        return []
    try:
        there = nearest_folder(run / "checkpoints")
        free = shutil.disk_usage(there).free
        goes = [p for p in complete_checkpoints(run) if step_of(p) > step or is_ephemeral(p)]
        goes += visible_checkpoints(run, SUPERSEDED) + incomplete_checkpoints(run)
        free += sum(file.stat().st_size for folder in goes for file in folder.iterdir())
    except OSError:  # which whoever writes there says
        return []
    size = checkpoint_bytes(config, world)
    need = permanent * size + SPARE_BYTES
    if need <= free:
        return []
    first = f"raise checkpoint.every (now {every:,})" if size + SPARE_BYTES <= free else "free some space"
    return [
        f"checkpoints will take about {bytes_text(need)} more, and {there} has {bytes_text(free)} for them "
        f"({permanent:,} permanent of {bytes_text(size)} each, which all stay; ephemeral ones make way): {first}, or "
        "put run.folder on another disk"
    ]
