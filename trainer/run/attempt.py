"""What accompanies the training state while an attempt lasts: who watches it, saves it and ends it."""

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from stepline.comm.consensus import Consensus, Wish
from stepline.comm.gather import gathered
from stepline.trainer.data.verify import Verifier, copy_of, sharers, start_verifying
from stepline.trainer.errors import FAILED, ToBeContinued, TrainingStopped, Unreadable, UserError
from stepline.trainer.run.checkpoint import Checkpointer
from stepline.trainer.run.manifest import (
    DAMAGED,
    EPHEMERAL,
    PERMANENT,
    SUPERSEDED,
    complete_checkpoints,
    retire,
    short,
    step_of,
    visible_checkpoints,
)
from stepline.trainer.run.outcome import restarts, write_outcome
from stepline.trainer.run.signals import StopSignal
from stepline.trainer.run.start import Job
from stepline.trainer.run.state import TrainState
from stepline.trainer.run.stored import sound_checkpoint
from stepline.trainer.run.together import together, together_on_disk
from stepline.trainer.run.validation import validate, validated, validation_due
from stepline.trainer.run.watchdog import Watchdog
from stepline.trainer.watch.speed import Speedometer
from stepline.trainer.watch.watch import Watch

log = logging.getLogger("stepline")

WRITING = "writing a checkpoint"


class Interval:
    """Time between ephemeral checkpoints, by a clock that never jumps."""

    def __init__(self, minutes: float | None) -> None:
        self.seconds = None if minutes is None else 60 * minutes
        self.restart()

    def restart(self) -> None:
        """Counts from now on."""
        self._since = time.monotonic()

    def passed(self) -> bool:
        """Whether it is over."""
        return self.seconds is not None and time.monotonic() - self._since >= self.seconds


class Attempt:
    """One attempt of a job, on one rank: its methods with "all ranks" in their text are collectives."""

    def __init__(
        self, job: Job, state: TrainState, stop: StopSignal, verifier: Verifier, group: dist.ProcessGroup,
        number: int, stacks: TextIO, plan: dict[str, Any],
    ) -> None:  # fmt: skip
        config = job.config
        self.job, self.state, self.stop, self.verifier, self.group = job, state, stop, verifier, group
        self.first_step = state.step
        self.watch = self._watch(number, plan)
        self.saver = Checkpointer(job.folder, config.checkpoint.keep, job.device, self._save_failed)
        self.consensus = Consensus(group)
        self.due = Interval(config.checkpoint.ephemeral_minutes)
        self.speed = Speedometer(config, job.device, job.world.size, state.step, state.train_seconds)
        self.dog = Watchdog(
            config.parallel.timeout_s,
            stacks,
            lambda why: write_outcome(job.folder, number, FAILED, message=f"rank {job.world.rank}: {why}"),
        )
        self.saved_step = state.step if job.resume_from is not None else -1

    def _watch(self, number: int, plan: dict[str, Any]) -> Watch:
        """Raises UserError on all ranks where rank 0 cannot read the rows of the run so far."""
        job = self.job

        def begin() -> Watch:
            try:
                return Watch(
                    job.folder, job.config, self.state.step, enabled=job.world.rank == 0, plan=plan, attempt=number,
                    world_size=job.world.size,
                )  # fmt: skip
            except OSError as error:
                raise Unreadable(error.filename or job.folder, error) from error

        return together(begin, self.group)

    def _wish(self, save: bool = False) -> Wish:
        return Wish(self.verifier.problem() is not None, self.stop.number, save)

    def begin_to_agree(self) -> None:
        """Starts to tell all ranks what this one wants of them after the step."""
        due = self.job.world.rank == 0 and not self.saver.busy and self.due.passed()
        self.consensus.begin(self._wish(save=due))

    def agreed(self) -> Wish:
        """What all ranks do after the step at whose start they began to agree."""
        agreed = self.consensus.result()
        self.dog.tick(f"step {self.state.step}")
        if agreed.damaged:
            self.refuse_damaged_data()
        return agreed

    def _told_to_stop_in_validation(self) -> int:
        self.dog.tick(f"step {self.state.step} and a part of its validation")
        self.watch.beat(self.state.step, "validating")
        return self.told_to_stop()

    def told_to_stop(self) -> int:
        """The signal that any of all ranks has received, or 0; waits for them. Raises UserError for damaged data."""
        agreed = self.consensus.settle(self._wish())
        if agreed.damaged:
            self.refuse_damaged_data()
        return agreed.stop

    def owes_validation(self) -> bool:
        """Whether all ranks must validate before the next step: a run that is told to stop in a validation has none."""
        step, folder = self.state.step, self.job.folder
        due = self.job.world.rank == 0 and step > 0 and validation_due(step, self.job.config)
        owed = together(lambda: due and not validated(folder, step), self.group)
        return any(gathered(owed, self.group))

    def validate(self, whole: bool) -> dict[str, float] | None:
        """Held-out loss and bits per byte, logged; None where all ranks were told to stop meanwhile."""
        state = self.state
        self.watch.beat(state.step, "validating")
        with self.speed.paused():
            values = validate(state, whole, self._told_to_stop_in_validation)
        if values is not None:
            if self.job.expected is not None:  # beside the loss, wherever that is shown
                values["expected_final_loss"] = self.job.expected.loss
            self.watch.log({"step": state.step, "tokens": state.tokens} | values)
        return values

    def save(self, permanent: bool) -> None:
        """Starts a checkpoint of this step on all ranks."""
        state = self.state
        if self.saved_step == state.step:
            return
        with self._may_wait_for_writing(), self.speed.paused():
            kind = PERMANENT if permanent else EPHEMERAL
            state.train_seconds = self.speed.trained_s()
            self.saver.save(state.step, state.tensors(), state.counters(), kind)
        self.saved_step = state.step
        self.due.restart()
        log.info("saving %s step %d; training waited %.3f s", kind, state.step, self.saver.stalled_s)

    def finish_saving(self) -> None:
        """Waits until the last checkpoint is on disk, on all ranks; tries once more where it could not be written.

        Raises TrainingStopped when that fails too.
        """
        if self.written():
            return
        self.saved_step = -1
        self.save(permanent=self.state.step == self.job.config.total_steps())
        if self.written():
            return
        last = visible_checkpoints(self.job.folder)
        raise TrainingStopped(
            f"the checkpoint of step {self.state.step} could not be saved; mend the disk under {self.job.folder} and "
            f"start the same command again, which goes on from {last[-1].name if last else 'the beginning'}"
        )

    def written(self) -> bool:
        """Waits for the checkpoint that is being written, on all ranks; whether the newest one is on disk."""
        with self._may_wait_for_writing(), self.speed.paused():
            return self.saver.finish()

    @contextlib.contextmanager
    def _may_wait_for_writing(self) -> Iterator[None]:
        """Inside, a checkpoint may take its own time: the heartbeat says so, and the watchdog allows it."""
        limit_s = self.saver.limit_s
        self.watch.beat(self.state.step, "saving", limit_s)
        with self.dog.longer(limit_s, WRITING):
            yield

    def to_be_continued(self, number: int) -> ToBeContinued:
        """What all ranks say when they leave by a signal, and whose ranks have received one."""
        told = gathered((self.stop.launcher, restarts()) if self.stop.number else None, self.group)
        saved = f"step {self.state.step} is saved" if self.state.step else "no step was made"
        # with it the run would go back to that checkpoint
        command = "the same command" + (" without --resume" if self.job.resume_chosen else "")
        message = f"{signal.Signals(number).name}: {saved}; {command} continues the run"
        return ToBeContinued(message, dict(sorted(one for one in set(told) if one)))

    def saved(self) -> dict[str, Any]:
        """What the heartbeat says of checkpoints."""
        resumed = None if self.job.resume_from is None else self.job.resume_from.name
        return {"last_checkpoint": self.saver.name or resumed, "failed_saves": self.saver.failed}

    def refuse_damaged_data(self) -> None:
        """Ends all ranks where one of them has found a damaged shard while training (UserError).

        What this attempt has trained may have read it: its checkpoints no longer count, unless the text is held out.
        """
        self.written()
        problem, trained_on = damage(self.verifier, self.group)
        if trained_on:
            problem += f"; what was trained since step {self.first_step} is given up"
            if self.job.world.rank == 0 and (left := self._give_up()):
                problem += f" (remove {', '.join(map(str, left))} by hand: it cannot be set aside)"
        raise UserError(problem)

    def _give_up(self) -> list[Path]:
        """Takes the checkpoints of this attempt out of those that count; returns those that the system keeps."""
        left = []
        for checkpoint in visible_checkpoints(self.job.folder):
            if step_of(checkpoint) > self.first_step:
                try:
                    retire(checkpoint, SUPERSEDED)
                except OSError:
                    left.append(checkpoint)
        return left

    def _save_failed(self, why: str) -> None:
        self.watch.alert("Checkpoint failed", why, "error")


def go_on(job: Job, state: TrainState, group: dist.ProcessGroup) -> None:
    """Loads the checkpoint to continue from, or the one before it where that is damaged, on all ranks. Raises UserError
    on all of them."""
    job.resume_from, notes = sound_checkpoint(job.resume_from, job.folder, group, only_this=job.resume_chosen)
    job.notes += notes
    counters = state.load(job.resume_from, group)

    def take_over() -> None:
        if job.world.rank != 0:
            return
        # damaged, or of a course that the user has gone back from; the newest first, which a restart would take
        for later in reversed(complete_checkpoints(job.folder)):
            if step_of(later) > state.step:
                retire(later, DAMAGED if short(later) else SUPERSEDED)
                job.notes.append(f"{later.name} no longer counts: the run goes on from step {state.step}")
        run_id = job.folder / "run_id"
        if counters["run_id"] and not run_id.exists():
            run_id.write_text(counters["run_id"] + "\n", encoding="utf-8")

    together_on_disk(take_over, job.folder, group)
    log.info("continuing %s at step %d", job.resume_from, state.step)


def verify_data(job: Job, group: dist.ProcessGroup) -> Verifier:
    """Starts to check the data: every copy of it, each by the ranks that read it. A collective."""
    copies = gathered(copy_of(job.metas), group)
    return start_verifying(job.config, job.metas, *sharers(copies, job.world.rank))


def damage(verifier: Verifier, group: dist.ProcessGroup) -> tuple[str | None, bool]:
    """What any rank has found wrong with the data, and whether steps may have read it; alike on all ranks."""
    wrong = [one for one in gathered((verifier.problem(), verifier.trained_on), group) if one[0] is not None]
    return max(wrong, key=lambda one: one[1], default=(None, False))


def refuse_damaged_data(verifier: Verifier, group: dist.ProcessGroup) -> None:
    """Raises UserError on all ranks where one of them has found a damaged shard before the first step."""
    if (problem := damage(verifier, group)[0]) is not None:
        raise UserError(problem)
