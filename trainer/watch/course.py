"""What wandb holds of a run that has gone back, and goes on otherwise."""

import logging
from pathlib import Path

from stepline.trainer.config import Config
from stepline.trainer.config_io import read_run_config
from stepline.trainer.config_resume import same_course
from stepline.trainer.watch.loggers import new_run_id, run_id
from stepline.trainer.watch.sent import Sent

log = logging.getLogger("stepline")


def leave_course(folder: Path, config: Config, step: int) -> None:
    """To be called before a run that goes on from `step` writes its config.yaml anew.

    wandb drops no row. Where it has rows behind `step` that another budget makes otherwise, the run goes on as a new
    run of wandb, which is sent the rows before too. Raises OSError.
    """
    path = folder / "wandb-sent.json"
    sent = Sent(path, 0).step
    if sent <= step or same_course(read_run_config(folder), config, sent):
        return
    before, now = run_id(folder), new_run_id(folder)
    path.unlink(missing_ok=True)
    log.warning(
        "wandb's run %s keeps its rows up to step %d, of a course that was left at step %d; this one goes on as its "
        "run %s, with all rows", before, sent, step, now,
    )  # fmt: skip
