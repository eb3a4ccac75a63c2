"""All that watches a run: the metrics file, the heartbeat, the terminal, wandb, alerts. Only rank 0 has any."""

import json
from pathlib import Path
from typing import Any

from stepline.trainer.config import Config
from stepline.trainer.config_io import dump
from stepline.trainer.errors import FAILED, STATUS
from stepline.trainer.watch.alerts import Alerts
from stepline.trainer.watch.heartbeat import starting
from stepline.trainer.watch.loggers import Loggers, ProgressLogger
from stepline.trainer.watch.metrics import MetricsFile, keep_last
from stepline.trainer.watch.wandb_logger import WandbLogger


class Watch:
    """Fans out what a run says of itself. Whatever happens to the watching, no method raises and the run goes on.

    `start_step` is where a resumed run continues: later rows of metrics.jsonl are dropped. `plan` is what plan.json
    holds. Where not `enabled` (every rank but 0), no method does anything.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        start_step: int,
        enabled: bool,
        *,
        plan: dict[str, Any] | None = None,
        attempt: int = 1,
        world_size: int = 1,
    ) -> None:
        self.enabled, self.loggers = enabled, Loggers()
        if not enabled:
            return
        self.batch_tokens, self.step = config.budget.batch_tokens, start_step
        self.heartbeat = starting(folder, config, start_step, attempt, world_size)
        self.file = MetricsFile(folder / "metrics.jsonl")
        self.last = self.file.truncate_after(start_step)
        self.wandb = WandbLogger(
            folder,
            config.logging.project,
            folder.name,
            dump(config) | {"plan": plan or _plan(folder)},
            config.logging.wandb,
            logged=self.file.read,
        )
        self.loggers = Loggers(ProgressLogger(config.total_steps(), start_step), self.wandb)
        self.alerts = Alerts(self.loggers.alert, skipped=self.last.get("skipped", 0))

    def log(self, row: dict[str, Any]) -> None:
        """One row of a step or of a validation; it holds `step` and `tokens`."""
        if not self.enabled:
            return
        waited_from = self.file.waits_from
        self.file.write(row)
        self.loggers.log(row)
        self._tell_wandb(waited_from)
        keep_last(self.last, row)
        self.heartbeat.fields |= {k: row[k] for k in ("loss", "tokens_per_second") if k in row}
        self.alerts.row(row)

    def first_loss(self) -> float | None:
        """Of the run's first step; None where there is no row of it, or it was not finite."""
        return (
            next((row["loss"] for row in self.file.read() if "loss" in row), None) if self.enabled else None
        )

    def beat(self, step: int, status: str, limit_s: float = 0.0, **fields: Any) -> None:
        """There is progress: call it at every step, it writes heartbeat.json at most every 5 s.

        status: starting, training, validating, saving; a change is written at once. limit_s: what that may take, where
        it is more than `parallel.timeout_s`. fields: `tokens`, `last_checkpoint`, `failed_saves`, or anything else that
        the file shall show; each stays until given again.
        """
        if not self.enabled:
            return
        if status == "saving":
            waited_from = self.file.waits_from
            self.file.sync()
            self._tell_wandb(waited_from)
        self.step = step
        median, count = self.heartbeat.times.median, self.heartbeat.times.count
        fields.setdefault("tokens", step * self.batch_tokens)
        took = self.heartbeat.beat(step, status, limit_s, **fields)
        if took is not None:
            self.alerts.step(step, took, median, count)

    def _tell_wandb(self, waited_from: dict[str, Any] | None) -> None:
        """What began or ended since the first row that waited was this one: wandb writes to the same disk."""
        if waited_from is None and self.file.waits_from is not None:
            self.wandb.disk_is_full()
        if waited_from is not None and self.file.waits_from is None:
            self.wandb.begin_again(waited_from)

    def alert(self, title: str, text: str, level: str = "warn") -> None:
        """Says something that cannot wait, in the log and as a wandb alert; level: info, warn or error.

        The same title is said once in ten minutes.
        """
        if self.enabled:
            self.alerts.say(title, text, level)

    def close(self, exit_code: int = 0, summary: dict[str, Any] | None = None, **fields: Any) -> None:
        """The attempt has ended: by its exit code `done` (0), `continue` (75: saved), `stopped` (2) or `failed`.

        wandb's summary gets this, the run's last values and `summary`; heartbeat.json gets `fields`.
        """
        if not self.enabled:
            return
        status = STATUS.get(exit_code, STATUS[FAILED])
        self.file.close()
        self.beat(self.step, status, exit_code=exit_code, **fields)
        self.loggers.finish(
            exit_code, self.last | (summary or {}) | {"status": status, "exit_code": exit_code}
        )


def _plan(folder: Path) -> dict[str, Any] | None:
    """What plan.json of an earlier attempt holds."""
    try:
        return json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
