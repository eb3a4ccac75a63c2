"""All that watches a run, behind one `log`: the metrics file, the terminal, wandb. Only rank 0 has any."""

from pathlib import Path
from typing import Any

from stepline.trainer.config import Config
from stepline.trainer.config_io import dump
from stepline.trainer.watch.loggers import Loggers, ProgressLogger, WandbLogger
from stepline.trainer.watch.metrics import MetricsFile


class Watch:
    """Fans rows out; `start_step` is where a resumed run continues, later rows of the file are dropped."""

    def __init__(self, folder: Path, config: Config, start_step: int, enabled: bool) -> None:
        self.file, self.loggers = None, Loggers()
        if not enabled:
            return
        self.file = MetricsFile(folder / "metrics.jsonl")
        self.file.truncate_after(start_step)
        self.loggers = Loggers(
            ProgressLogger(config.total_steps(), start_step),
            WandbLogger(folder, config.logging.project, folder.name, dump(config), config.logging.wandb),
        )

    def log(self, row: dict[str, Any]) -> None:
        """One row of a step or of a validation; it holds `step` and `tokens`."""
        if self.file is not None:
            self.file.write(row)
        self.loggers.log(row)

    def close(self, exit_code: int = 0) -> None:
        """The attempt has ended."""
        if self.file is not None:
            self.file.close()
        self.loggers.finish(exit_code)
