"""`stepline doctor`: what this machine, or the ranks of a launch, can do, and what will not work."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from stepline.trainer.run import doctor_gpu as gpu
from stepline.trainer.run import doctor_machine as machine
from stepline.trainer.run import doctor_software as software
from stepline.trainer.run.devices import hardware_present, pick_device
from stepline.trainer.run.doctor_ranks import Site, check_alike, check_shared, facts, hangs, talk
from stepline.trainer.run.doctor_report import NARROW, Check, combine, is_broken, look, show, to_json
from stepline.trainer.run.folder import nearest_folder
from stepline.trainer.run.start import launched_world


def run_doctor(folder: str, as_json: bool, thorough: bool = False, timeout_s: float = 60.0) -> int:
    """Looks at everything and prints it on rank 0; returns 1 when something that a training needs is broken.

    folder: where runs are kept. thorough: try torch.compile too. timeout_s: how long one rank waits for another.
    Raises UserError where the environment is no launcher's.
    """
    world = launched_world()
    with _stdout_to_stderr():
        site = Site(world, pick_device("auto", world)[0], Path(folder), thorough, timeout_s)
        checks, ranks = examine(site)
    if world.rank == 0:
        _print(checks, ranks, as_json)
    elif not ranks and world.local_rank == 0:
        print(f"error: {checks[-1].says}", file=sys.stderr)
    code = int(world.rank == 0 and is_broken(checks))
    if hangs():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def examine(site: Site) -> tuple[list[Check], list[dict[str, Any]]]:
    """On rank 0 the checks of all ranks joined, and what each rank is; on the others their own and nothing where
    rank 0 could not be met."""
    code = software.code_version()
    own = local_checks(site, code)
    mine = facts(site, code) | {"checks": [vars(check) for check in own]}
    told = talk(site, mine)
    if site.world.rank != 0:
        met = not any(check.name == "ranks" for check in told.checks)
        return [*own, *told.checks], [mine] if met else []

    ranks = [reading for reading in told.readings if reading is not None]
    reports = {r["rank"]: [Check(**c) for c in [*r["checks"], *r.pop("talk", [])]] for r in ranks}
    for reading in ranks:
        reading["checks"] = [vars(check) for check in reports[reading["rank"]]]
    if len(told.readings) < site.world.size:  # they did not meet
        reports[0] += told.checks
        return combine(reports), ranks
    joined = combine(reports)
    if site.world.size > 1:
        skews = {r["rank"]: r["clock_skew_s"] for r in ranks if r.get("clock_skew_s") is not None}
        joined = [machine.add_skew(c, skews) if c.name == "clock" and skews else c for c in joined]
        joined.append(check_alike(told.readings))
        if all("sees_folder" in reading for reading in ranks):
            seen = {reading["rank"]: reading["sees_folder"] for reading in ranks}
            joined.append(check_shared(seen, nearest_folder(site.folder)))
    return joined, ranks


def local_checks(site: Site, code: dict[str, str]) -> list[Check]:
    """What this rank finds without the others; what is alike for a machine is looked at by its first rank."""
    on_gpu, local = site.device.type == "cuda", site.world.local_size
    checks = [
        look("python", software.check_python),
        look("stepline", software.check_code, code),
        look("packages", software.check_packages),
    ]
    if site.world.local_rank == 0:
        gpus = gpu.read_gpus()
        checks += [
            look("gpus", gpu.check_gpus, gpus, local, hardware_present()),
            look("driver", lambda: gpu.check_driver(gpu.driver_cuda(), torch.version.cuda)),
            look("gpu links", gpu.check_links, gpus),
        ]
    checks += [look("fp8", gpu.check_fp8, site.device), look("2:4 sparsity", gpu.check_sparse, site.device)]
    if site.world.local_rank == 0:
        checks += [
            look("triton", software.check_triton, on_gpu),
            look("compile", software.check_compile, on_gpu, site.thorough),
            look("memory", machine.check_memory, local),
            look("threads", machine.check_threads, torch.get_num_threads(), local, on_gpu),
            look("/dev/shm", machine.check_shared_memory, len(gpus)),
            look("open files", machine.check_open_files),
            look("disk", machine.check_disk, site.folder),
            look("clock", machine.check_clock),
            look("slurm", software.check_slurm),
            look("wandb", software.check_wandb),
        ]
    others = [name for name in software.WITHOUT if name != "wandb"]
    return checks + [look(name, software.check_optional, name) for name in others]


def _print(checks: list[Check], ranks: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(to_json(checks, ranks)))
        return
    show(checks, ranks, Console(width=None if sys.stdout.isatty() else NARROW))


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """gloo and others write to file descriptor 1, where the one JSON object belongs."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
