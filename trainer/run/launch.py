"""From a command line to a finished run: logs, process group, outcome, exit code."""

import contextlib
import logging
import os
import sys
import time
import traceback
from typing import TextIO

import torch.distributed as dist

from stepline.comm import slurm
from stepline.comm.gather import gathered
from stepline.comm.mesh import World
from stepline.trainer.errors import (
    DONE,
    FAILED,
    TO_BE_CONTINUED,
    USER_ERROR,
    ToBeContinued,
    TrainingStopped,
    UserError,
    mistake_of,
    speaks,
)
from stepline.trainer.run.alike import check_ranks_alike
from stepline.trainer.run.devices import device_memory
from stepline.trainer.run.folder import checkpoint_to_resume, keep_tokenizer, make_folder
from stepline.trainer.run.lock import only_one
from stepline.trainer.run.logs import start_logs, wait_for
from stepline.trainer.run.malloc import keep_freed_memory
from stepline.trainer.run.manifest import COMPLETE, step_of
from stepline.trainer.run.outcome import diverged_before, restarts, told_before, write_outcome
from stepline.trainer.run.refusal import note_refusal
from stepline.trainer.run.signals import StopSignal
from stepline.trainer.run.start import Job, join, launched_world, start_job
from stepline.trainer.run.together import together
from stepline.trainer.run.validation import validated
from stepline.trainer.watch import heartbeat

ALONE_S = 15.0  # more than ranks of one node part while they start, on a busy machine too
REFUSED = "refused"

log = logging.getLogger("stepline")


def run_training(
    config: str, overrides: list[str], resume: str, stop: StopSignal | None = None,
    neighbours: list[int] | None = None,
) -> int:  # fmt: skip
    """One rank of `stepline train`; returns the exit code. A user's mistake is said by one rank of each node, or by
    the one that is alone with it.

    stop: takes the signals that ask the run to save and leave. neighbours: `slurm.neighbours` when this one began.
    """
    stop = stop or StopSignal()
    says = speaks()  # asked before there is a process group
    # before the environment becomes that of a rank of torchrun's
    neighbours = slurm.neighbours() if neighbours is None else neighbours
    with contextlib.ExitStack() as held:
        try:
            world = launched_world(rendezvous=False)
            job = start_job(config, overrides, resume, world, launcher=stop.launcher)
            if job.plan is not None and (code := _nothing_to_do(job)) is not None:
                return code
            launched_world()  # raises where the ranks cannot meet
            make_folder(job.folder)
            if job.device.type == "cpu":
                keep_freed_memory()
            if world.rank == 0:
                held.enter_context(only_one(job.folder, stop.launcher))
            join(world, job.device, job.config.parallel.timeout_s)
            again, launchers = zip(*gathered((job.again, stop.launcher)))
            asked, resume = resume, "auto" if any(again) else resume
            if _has_moved_on(job, resume):
                job = together(lambda: start_job(config, overrides, resume, world))
            job.again = any(again)
            job.launchers = sorted(set(launchers))
            if asked != resume:
                job.notes.append(
                    f"this launch has begun before: the run goes on from its newest checkpoint, not by --resume {asked}"
                )
            if (code := _nothing_to_do(job, stop.launcher)) is not None:
                dist.destroy_process_group()
                return code
            number, stacks = start_logs(job)
            _keep_tokenizer(job)
        except (UserError, OSError) as error:
            mistake = mistake_of(error)
            if says or _alone(stop, neighbours):
                print(f"error: {'' if says else _rank()}{mistake}", file=sys.stderr)
                held.close()
                waits = not says and not dist.is_initialized()  # rank 0, for this one
                note_refusal(config, overrides, mistake, stop.launcher if waits else None)
            return USER_ERROR
        try:
            code = _run(job, stop, number, stacks)
        except BaseException:
            if world.size == 1:  # otherwise it might wait for ranks that are gone
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()
        return code


def _keep_tokenizer(job: Job) -> None:
    """Once ranks have met: a folder with nothing else is no run's, to a later one. Raises UserError on all ranks."""

    def keep() -> None:
        if job.world.rank == 0:
            keep_tokenizer(job.folder, job.metas[0].tokenizer_path, fresh=job.resume_from is None)

    together(keep)


def _alone(stop: StopSignal, neighbours: list[int] | None) -> bool:
    """Whether a mistake is this rank's own, as on a GPU smaller than the others: none that found the same is still here
    a little later. Where one rank ends, torchrun at once stops the rest. Srun lets them be, and the node's first rank,
    which says what all find, is gone.

    neighbours: processes of that first rank when this one began, under srun; else None.
    """
    if neighbours is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    deadline = time.monotonic() + ALONE_S
    # of one that was never seen nothing is known: better said twice than not at all
    while stop.received is None and (not neighbours or any(map(slurm.is_first_of_node, neighbours))):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.05)
    return False


def _rank() -> str:
    return f"rank {os.environ.get('RANK', os.environ.get('SLURM_PROCID'))}: "


def _nothing_to_do(job: Job, launcher: str | None = None) -> int | None:
    """The exit code, said by rank 0, where the run has made its last step and its last validation, or stays stopped.

    launcher: of this rank; with it all ranks ask each other whether one of theirs was told to stop, and whether the run
    has diverged in the launch that starts it again.
    """
    finished, code, says, told, diverged = False, None, "", [], None
    if launcher is None:
        with contextlib.suppress(UserError):  # all say it once they have met
            finished = _finished(job)
    else:
        ends = together(lambda: job.world.rank == 0 and _finished(job))
        mine = (ends, diverged_before(job.folder, launcher), told_before(job.folder, launcher))
        ends, words, told = zip(*gathered(mine))
        finished = ends[0]  # another node may see the end of the run a while later
        diverged = next(filter(None, words), None)
    if finished:
        code, says = DONE, f"{job.folder} is finished; choose another run.folder for a new run"
    elif any(told):
        code, says = TO_BE_CONTINUED, f"{job.folder} was told to stop and has saved; start it again"
    elif diverged:
        code, says = FAILED, f"error: not started again, as this launch has diverged: {diverged}"
    if code is not None and job.world.rank == 0:
        print(says, file=sys.stderr)
    return code


def _finished(job: Job) -> bool:
    """Raises UserError where metrics.jsonl cannot be read."""
    steps = job.config.total_steps()
    return job.resume_from is not None and step_of(job.resume_from) >= steps and validated(job.folder, steps)


def _has_moved_on(job: Job, resume: str) -> bool:
    """Whether a rank would now choose another checkpoint than when it started, or has yet to choose one: the attempt
    before may have saved while this one waited for its end. A collective, while rank 0 keeps others out of the folder;
    a node that does not see rank 0's choice yet waits for it."""
    mine = "none chosen" if job.plan is None else job.resume_from and job.resume_from.name
    try:
        now = checkpoint_to_resume(job.folder, resume)[0] if job.world.rank == 0 else None
        new = now and now.name
    except UserError:  # which start_job raises, too
        new = REFUSED
    (new, *_), chosen = zip(*gathered((new, mine)))
    moved = any(one != new for one in chosen)
    if moved and new not in (None, REFUSED):
        wait_for(job.folder / "checkpoints" / new / COMPLETE)
    return moved


def _run(job: Job, stop: StopSignal, number: int, stacks: TextIO) -> int:
    from stepline.trainer.run.loop import train

    started = time.time()
    outcome: dict = {}
    code = FAILED
    try:
        if job.world.rank == 0:  # what the attempt before has left says that all is well
            step = 0 if job.resume_from is None else step_of(job.resume_from)
            heartbeat.starting(job.folder, job.config, step, number, job.world.size)
        check_ranks_alike(job)
        outcome |= train(job, stop, number, stacks)
        code = DONE
    except (UserError, TrainingStopped, ToBeContinued) as error:
        codes = {UserError: USER_ERROR, TrainingStopped: FAILED, ToBeContinued: TO_BE_CONTINUED}
        code = next(code for kind, code in codes.items() if isinstance(error, kind))
        outcome |= {"message": str(error)}
        if code == TO_BE_CONTINUED:
            outcome["told"] = error.told
        if code == FAILED and error.diverged:
            outcome["diverged"] = True
        log.error("%s%s", "" if code == TO_BE_CONTINUED else "error: ", error)
    except BaseException as error:
        outcome |= {"message": f"rank {job.world.rank}: {type(error).__name__}: {error}"}
        log.error("%s", traceback.format_exc())
        raise
    finally:
        outcome["seconds"] = round(time.time() - started, 3)
        if job.train_seconds is not None:
            outcome["train_seconds"] = round(job.train_seconds, 3)
        outcome["launched_by"] = {stop.launcher: restarts()}
        if job.world.rank == 0 or code == FAILED:  # the rank that fails first knows why
            write_outcome(job.folder, number, code, **outcome)
        if job.world.rank == 0:
            heartbeat.end(job.folder, code)
    return code


def dry_run(config: str, overrides: list[str], resume: str) -> int:
    """`stepline train --dry-run`: prints the resolved config with the origin of each value, and the memory that a
    step needs; allocates nothing. Of several ranks the first one speaks."""
    job = start_job(config, overrides, resume, world := launched_world(rendezvous=False), dry=True)
    if world.rank == 0:
        _describe_dry(job, world)
    if job.refused is not None:
        raise job.refused
    return DONE


def _describe_dry(job: Job, world: World) -> None:
    from stepline.trainer.config_io import format_config
    from stepline.trainer.plan.memory import Layout, estimate, memory_table

    print(format_config(job.config, job.origins), end="")
    layout = Layout.of(job.config, world.size)
    has = device_memory(job.device, world.local_size)
    for line in memory_table(estimate(job.config, layout), layout, has):
        print(f"# {line}")
    for note in job.notes:
        print(f"# note: {note}")
