"""Runs of a sweep on this machine, several at a time, each `stepline train` in a process of its own.

A start costs about 4 s, which a process that stays alive would save; one process for each run keeps a crash, a
leak or a stopped run away from the others. Imports no torch.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from stepline.trainer.files import locked
from stepline.trainer.plan.sweep import SweepRun
from stepline.trainer.plan.sweep_cost import Rate, run_seconds
from stepline.trainer.run.manifest import complete_checkpoints
from stepline.trainer.run.sweep_runs import Result, RunFailed, SweepFolder

POLL_SECONDS = 0.1
GRACE_SECONDS = 40
"""torchrun gives its ranks 30 s to end."""
HOPELESS = 3
"""Failures of a sweep without a single result after which the others are not tried."""
LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS",
)  # fmt: skip


@dataclass
class Report:
    """How a call of the sweep went."""

    done: int = 0
    diverged: int = 0
    failed: list[tuple[SweepRun, str]] = field(default_factory=list)
    """With the last word of each."""
    elsewhere: list[SweepRun] = field(default_factory=list)
    """Held by another process."""
    stopped: str = ""
    """Name of the signal that ended the call."""


@dataclass
class _Child:
    run: SweepRun
    process: subprocess.Popen
    slot: int
    held: ExitStack
    """Lock and log."""
    started: float
    continues: bool
    """From a checkpoint of an earlier attempt."""


class LocalRunner:
    """Does the missing runs of a sweep, `jobs` at a time."""

    def __init__(
        self,
        sweep: SweepFolder,
        *,
        jobs: int,
        threads: int,
        gpus: Iterable[str],
        rate: Rate | None,
        say: Callable[[str], None],
    ) -> None:
        """gpus: as CUDA_VISIBLE_DEVICES calls them; they are dealt out to the jobs; rate: for the time that is left."""
        self.sweep, self.jobs, self.threads = sweep, jobs, threads
        self.gpus, self.rate, self.say = list(gpus), rate, say
        self.report = Report()
        self.running: list[_Child] = []
        self.estimated = self.taken = 0.0
        """Seconds of the runs that made all their steps in this call, as estimated and as they were: their ratio
        corrects what is left."""

    def do(self, runs: Sequence[SweepRun]) -> Report:
        """Returns when all have ended, or after a signal (SIGINT, SIGTERM, SIGHUP) with no process left behind."""
        # what has been tried comes last: it may fail every time
        waiting = deque(sorted(runs, key=lambda run: (self.sweep.folder(run) / "output.log").exists()))
        unproven = not any(self.sweep.result(run) for run in self.sweep.runs)
        with signals_noted() as caught:
            try:
                while (waiting or self.running) and not caught:
                    while waiting and len(self.running) < self.jobs and not caught:
                        self._start(waiting.popleft())
                    time.sleep(POLL_SECONDS)
                    for child in [c for c in self.running if c.process.poll() is not None]:
                        self.running.remove(child)
                        self._ended(child, [*waiting, *(c.run for c in self.running)])
                    hopeless = unproven and len(self.report.failed) >= HOPELESS and not self.report.done
                    if hopeless and waiting:
                        self.say(f"the first {len(self.report.failed)} runs failed: the others are not tried")
                        waiting.clear()
            finally:
                self._stop_all()
            if caught:
                self.report.stopped = signal.Signals(caught[0]).name
        return self.report

    def _start(self, run: SweepRun) -> None:
        held = ExitStack()
        lock = held.enter_context(locked(self.sweep.lock(run), wait=False))
        if lock is None:
            held.close()
            self.report.elsewhere.append(run)
            return
        folder = self.sweep.folder(run)
        if (folder / "result.json").is_file():  # by another call, since this one began
            held.close()
            return
        if (folder / "outcome.json").is_file():
            try:
                self._count(run, self.sweep.record(run))  # ended after the call that started it
                held.close()
                return
            except RunFailed:
                (folder / "outcome.json").unlink()
        if (folder / "checkpoints" / f"step-{run.steps:06d}" / "COMPLETE").is_file():
            # Killed between its last checkpoint and its outcome: a resume would have nothing left to do.
            shutil.rmtree(folder / "checkpoints")
        continues = bool(complete_checkpoints(folder))
        folder.mkdir(parents=True, exist_ok=True)
        log = held.enter_context((folder / "output.log").open("w", encoding="utf-8"))
        slot = min(set(range(self.jobs)) - {c.slot for c in self.running})
        process = subprocess.Popen(
            self.command(run),
            env=self._environment(slot),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which ends its children itself
            pass_fds=(lock,),
        )
        self.running.append(_Child(run, process, slot, held, time.monotonic(), continues))

    def command(self, run: SweepRun) -> list[str]:
        """The command line of one run."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.sweep.ranks)]
        return [
            sys.executable, *(launcher if self.sweep.ranks > 1 else ()), "-m", "stepline.trainer",
            "train", str(self.sweep.config), *run.overrides(),
            # absolute, as a folder that is called `~` is no home; quoted, as a value is YAML
            f"run.folder={json.dumps(str(self.sweep.folder(run).absolute()))}",
        ]  # fmt: skip

    def _environment(self, slot: int) -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
        environment["OMP_NUM_THREADS"] = str(self.threads)
        if self.gpus:
            mine = [
                self.gpus[(slot * self.sweep.ranks + i) % len(self.gpus)] for i in range(self.sweep.ranks)
            ]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(mine))
        return environment

    def _ended(self, child: _Child, left: list[SweepRun]) -> None:
        run, seconds = child.run, time.monotonic() - child.started
        try:
            result = self.sweep.record(run)
        except RunFailed as error:
            self.report.failed.append((run, str(error)))
            self.say(f"{run.name}  FAILED (exit code {child.process.returncode}): {error}")
            return
        finally:
            child.held.close()
        if self.rate is not None and not (child.continues or result.diverged):
            self.taken += seconds
            self.estimated += run_seconds(run, self.rate.flops_per_second)
        self._count(run, result, f"  {seconds:.0f} s", left)

    def _count(self, run: SweepRun, result: Result, seconds: str = "", left: Sequence[SweepRun] = ()) -> None:
        self.report.done += 1
        self.report.diverged += result.diverged
        count = self.sweep.write_csv()
        told = f"diverged: {result.reason}" if result.diverged else f"loss {result.loss:.4f}"
        remaining = ""
        if self.rate is not None and seconds:
            ratio = self.taken / self.estimated if self.estimated else 1.0
            ahead = ratio * sum(run_seconds(other, self.rate.flops_per_second) for other in left)
            remaining = f"  about {ahead / self.jobs / 60:.0f} min left"
        self.say(f"[{count}/{len(self.sweep.runs)}] {run.name}  {told}{seconds}{remaining}")

    def _stop_all(self) -> None:
        for child in self.running:
            _signal(child.process, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        for child in self.running:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal(child.process, signal.SIGKILL)
                child.process.wait()
            child.held.close()
        self.running.clear()


def _signal(process: subprocess.Popen, number: int) -> None:
    """To the process and all that it has started in its session."""
    if process.poll() is None:
        os.killpg(process.pid, number)


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM and SIGHUP instead of dying by them: nothing is interrupted half-way."""
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.signal(n, lambda number, _: caught.append(number)) for n in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
