"""From a command line to a finished run: logs, process group, outcome, exit code."""

import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from stepline.comm.mesh import World, check_rendezvous, start_process_group
from stepline.trainer.errors import TrainingStopped, UserError
from stepline.trainer.run.checkpoint import complete_checkpoints
from stepline.trainer.run.device_memory import device_memory
from stepline.trainer.run.start import Job, make_folder, start_job

DONE, FAILED, USER_ERROR = 0, 1, 2

log = logging.getLogger("stepline")


def run_training(config: str, overrides: list[str], resume: str) -> int:
    """One rank of `stepline train`; returns the exit code. A user's mistake is said by one rank of each node."""
    try:
        world = World.from_environment()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    try:
        job = start_job(config, overrides, resume, world)
    except UserError as error:
        if world.local_rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    if job.resume_from is not None and complete_checkpoints(job.folder)[-1] == job.resume_from:
        finished = int(job.resume_from.name.removeprefix("step-")) >= job.config.total_steps()
        if finished:
            if world.rank == 0:
                print(f"{job.folder} is finished; choose another run.folder for a new run", file=sys.stderr)
            return DONE
    try:
        check_rendezvous(world)
        make_folder(job.folder)
    except (UserError, ValueError) as error:
        if world.local_rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    try:
        start_process_group(world, job.device, job.config.parallel.timeout_s)
    except dist.DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if world.rank == 0:
            reason = (
                "is in use"
                if "EADDRINUSE" in str(error)
                else f"cannot be used ({str(error).splitlines()[0]})"
            )
            print(
                f"error: port {address} {reason}; choose another with --master-port or MASTER_PORT",
                file=sys.stderr,
            )
        return USER_ERROR
    try:
        return _run(job)
    finally:
        dist.destroy_process_group()


def _run(job: Job) -> int:
    from stepline.trainer.run.loop import train

    attempt = _start_logs(job)
    started = time.time()
    outcome = {"status": "done", "exit_code": DONE, "attempt": attempt}
    try:
        _check_layout_alike(job)
        outcome |= train(job)
    except (UserError, TrainingStopped) as error:
        code = USER_ERROR if isinstance(error, UserError) else FAILED
        outcome |= {"status": "stopped", "exit_code": code, "message": str(error)}
        log.error("error: %s", error)
    except BaseException as error:
        outcome |= {"status": "failed", "exit_code": FAILED, "message": f"{type(error).__name__}: {error}"}
        log.error("%s", traceback.format_exc())
        raise
    finally:
        if job.world.rank == 0:
            outcome["seconds"] = round(time.time() - started, 1)
            _write_outcome(job.folder, outcome)
    return outcome["exit_code"]


def _check_layout_alike(job: Job) -> None:
    """Raises UserError where the ranks have settled on different layouts, as they may on unequal devices."""
    parallel = job.config.parallel
    layouts: list = [None] * job.world.size
    dist.all_gather_object(layouts, (parallel.shard, parallel.micro_batch))
    if len(set(layouts)) > 1:
        raise UserError(
            f"the ranks' devices differ in memory and lead to different layouts (shard, micro-batch): "
            f"{sorted(set(layouts))}; set parallel.shard and parallel.micro_batch"
        )


def _write_outcome(folder: Path, outcome: dict) -> None:
    (folder / "outcome.json").write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")


def _start_logs(job: Job) -> int:
    """Opens logs/attempt-K/rank-R.log on every rank; rank 0 also speaks on standard error. Returns K."""
    attempt = [0]
    if job.world.rank == 0:
        earlier = [int(p.name.removeprefix("attempt-")) for p in (job.folder / "logs").glob("attempt-*")]
        attempt = [max(earlier, default=0) + 1]
        (job.folder / "logs" / f"attempt-{attempt[0]}").mkdir(parents=True)
    dist.broadcast_object_list(attempt, src=0)
    folder = job.folder / "logs" / f"attempt-{attempt[0]}"
    folder.mkdir(parents=True, exist_ok=True)  # a node whose file system shows the folder late
    handlers: list[logging.Handler] = [
        logging.FileHandler(folder / f"rank-{job.world.rank}.log", encoding="utf-8")
    ]
    handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    if job.world.rank == 0:
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[1].setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = handlers
    log.setLevel(logging.INFO)
    log.propagate = False
    return attempt[0]


def dry_run(config: str, overrides: list[str], resume: str) -> int:
    """`stepline train --dry-run`: prints the resolved config with the origin of each value, and the memory that a
    step needs; allocates nothing."""
    from stepline.trainer.config_io import format_config
    from stepline.trainer.plan.memory import Layout, estimate, memory_table

    try:
        world = World.from_environment()
    except ValueError as error:
        raise UserError(str(error)) from error
    job = start_job(config, overrides, resume, world)
    print(format_config(job.config, job.origins), end="")
    layout = Layout.of(job.config, world.size)
    has = device_memory(job.device, world.local_size)
    for line in memory_table(estimate(job.config, layout), layout, has):
        print(f"# {line}")
    for note in job.notes:
        print(f"# note: {note}")
    return DONE
