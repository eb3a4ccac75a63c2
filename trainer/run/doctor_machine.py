"""The doctor's checks of the machine: disk, memory, threads, limits, clock."""

import os
import resource
import secrets
import shutil
import tempfile
import time
from pathlib import Path

from stepline.trainer.config import CheckpointConfig
from stepline.trainer.plan.screen import short
from stepline.trainer.run.doctor_report import Check
from stepline.trainer.run.doctor_software import run_tool
from stepline.trainer.run.folder import nearest_folder
from stepline.trainer.run.limits import cpu_cores, memory_left, memory_limit

GB = 1e9
CHECKPOINT_BYTES = 12
"""Of a parameter: its fp32 value and AdamW's two moments."""
PERMANENT_ONES, EPHEMERAL_ONES = 10, CheckpointConfig().keep
"""What a run has on the disk at its end by default."""
LEAST_DISK, LEAST_MODEL, LEAST_FILES, LEAST_INODES = 100e6, 125e6, 1024, 10_000
SLOW_WRITE = 50e6
"""Bytes per second below which checkpoints are worth a warning."""
TRIAL_BYTES = 16 << 20
CLOCK_S = 1.0
"""Skew between two ranks' clocks that is worth a warning."""


def check_disk(folder: Path) -> Check:
    """Room, inodes and the speed of an fsynced file where runs are kept; leaves nothing behind."""
    there = nearest_folder(folder)
    try:
        usage, system = shutil.disk_usage(there), os.statvfs(there)
    except OSError as error:
        return Check(
            "disk", "broken", None, f"{there} cannot be read ({error.strerror}): choose another folder"
        )
    inodes = system.f_favail if system.f_files else None  # some file systems have no fixed number
    value = {
        "folder": str(there),
        "free_bytes": usage.free,
        "total_bytes": usage.total,
        "free_inodes": inodes,
    }
    if usage.free < LEAST_DISK:
        says = f"{there} has {usage.free / GB:.2f} GB free: a run cannot keep its files, free some space"
        return Check("disk", "broken", value, says)
    try:
        value["write_bytes_per_s"] = speed = write_speed(there)
    except OSError as error:
        says = (
            f"{there} cannot be written ({error.strerror}): a run keeps its files elsewhere, set run.folder"
        )
        return Check("disk", "broken", value, says)
    model = usage.free / (CHECKPOINT_BYTES * (PERMANENT_ONES + EPHEMERAL_ONES))
    says = f"{usage.free / GB:.1f} GB free at {there}, written at {speed / 1e6:.0f} MB/s; "
    says += f"a run of up to {short(model, 2)} parameters fits with {PERMANENT_ONES} permanent checkpoints "
    says += f"and {EPHEMERAL_ONES} ephemeral ones"
    if model < LEAST_MODEL:
        return Check("disk", "warning", value, f"{says}: free some space")
    if inodes is not None and inodes < LEAST_INODES:
        says = f"{there} has room for only {inodes} more files: remove some, or runs will end there"
        return Check("disk", "warning", value, says)
    if speed < SLOW_WRITE:
        minutes = 1e9 * CHECKPOINT_BYTES / speed / 60
        return Check("disk", "warning", value, f"{says}, and a checkpoint of 1B takes {minutes:.0f} minutes")
    return Check("disk", "ok", value, says)


def write_speed(folder: Path, size: int = TRIAL_BYTES) -> float:
    """Bytes per second of a file that is written and fsynced, as checkpoints are; raises OSError."""
    block = secrets.token_bytes(1 << 20)
    with tempfile.TemporaryFile(dir=folder, prefix=".") as file:
        start = time.monotonic()
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return size / max(time.monotonic() - start, 1e-6)


def check_memory(local_ranks: int) -> Check:
    """RAM, what is free of it, and what the container or job allows."""
    page = os.sysconf("SC_PAGE_SIZE")
    ram, limit, left = page * os.sysconf("SC_PHYS_PAGES"), memory_limit(), memory_left()
    free = min(_available() or ram, ram if left is None else left)
    value = {"ram_bytes": ram, "available_bytes": free, "limit_bytes": limit, "ranks": local_ranks}
    says = f"{free / GB:.1f} of {ram / GB:.1f} GB free"
    if limit is not None and limit < ram:
        says += f", a limit of {limit / GB:.1f} GB for this container or job"
    if local_ranks > 1:
        says += f", {free / local_ranks / GB:.1f} GB for each of {local_ranks} ranks"
    if free / local_ranks < GB:
        says += ": a rank alone takes up to 1 GB, start fewer ranks or end other programs"
        return Check("memory", "warning", value, says)
    return Check("memory", "ok", value, says)


def _available() -> int | None:
    """Bytes that programs can still get, page cache included; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def check_threads(threads: int, local_ranks: int, on_gpu: bool) -> Check:
    """torch's threads of all ranks of this machine against its cores."""
    cores = cpu_cores()
    best = max(1, int(cores) // local_ranks)
    given = os.environ.get("OMP_NUM_THREADS")
    value = {"cores": cores, "threads": threads, "ranks": local_ranks, "OMP_NUM_THREADS": given}
    says = f"{threads} thread{'s' if threads > 1 else ''} a rank x {local_ranks} on {cores:g} cores"
    if local_ranks > cores:
        return Check("threads", "warning", value, f"{says}: ranks wait for each other, start fewer")
    if threads * local_ranks > cores:
        return Check("threads", "warning", value, f"{says}: they wait for each other, OMP_NUM_THREADS={best}")
    if not on_gpu and 2 * threads * local_ranks <= cores:
        return Check("threads", "warning", value, f"{says}: cores stay idle, OMP_NUM_THREADS={best}")
    return Check("threads", "ok", value, says)


def check_shared_memory(gpus: int) -> Check:
    """/dev/shm, through which NCCL moves data between GPUs of a machine that have no direct path."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return Check("/dev/shm", "missing", None, "there is none; only NCCL between GPUs wants it")
    value, says = {"free_bytes": usage.free, "total_bytes": usage.total}, f"{usage.free / GB:.2f} GB free"
    if gpus > 1 and usage.free < GB:
        says += ": NCCL may fail between GPUs, start the container with --shm-size=8g"
        return Check("/dev/shm", "warning", value, says)
    return Check("/dev/shm", "ok", value, says)


def check_open_files() -> Check:
    """Files that a process may hold open: one for each shard of the data, some for each connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    value = {"soft": None if unlimited else soft, "hard": None if hard == resource.RLIM_INFINITY else hard}
    if unlimited:
        return Check("open files", "ok", value, "no limit")
    if soft < LEAST_FILES:
        says = f"only {soft}: data of many shards or many ranks will fail, `ulimit -n 65536` before the start"
        return Check("open files", "warning", value, says)
    return Check("open files", "ok", value, f"up to {soft:,} at once")


def check_clock() -> Check:
    """Whether the clock is kept by NTP, where the system says so."""
    kept = clock_synchronised()
    if kept is False:
        says = "not kept by NTP: times in logs and time limits drift, start chrony or timesyncd"
        return Check("clock", "warning", {"synchronised": kept}, says)
    says = "kept by NTP" if kept else "nothing here says whether NTP keeps it"
    return Check("clock", "ok", {"synchronised": kept}, says)


def add_skew(clock: Check, skews: dict[int, float]) -> Check:
    """The check of the clocks with what they differ by.

    skews: seconds that the clock of each rank is ahead of rank 0's, to some milliseconds.
    """
    skew = max(skews.values()) - min(skews.values())
    value, says = clock.value | {"skew_s": skew}, f"{clock.says}; the ranks' clocks differ by {skew:.3f} s"
    if skew <= CLOCK_S:
        return Check(clock.name, clock.status, value, says)
    odd = max(skews, key=lambda rank: abs(skews[rank]))
    says += f" (rank {odd}'s by {skews[odd]:+.1f} s): times in logs mislead, set the clocks"
    return Check(clock.name, "warning", value, says)


def clock_synchronised() -> bool | None:
    """By timedatectl or chronyc; None where neither answers."""
    told = run_tool("timedatectl", "show", "--property=NTPSynchronized", "--value", seconds=2)
    if told in ("yes", "no"):
        return told == "yes"
    told = run_tool("chronyc", "tracking", seconds=2)
    if told is None:
        return None
    return "Leap status     : Normal" in told
