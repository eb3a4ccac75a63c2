"""What the control groups (containers, SLURM jobs, systemd) allow this process. Imports no torch."""

import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
"""Names this process's groups, `ID:CONTROLLERS:PATH` a line; version 2 names no controllers."""


def _texts(controller: str, v2: str, v1: str) -> list[tuple[str, str]]:
    """File name and content from this process's group and all groups above it, in both versions."""
    try:
        lines = OWN.read_text().splitlines()
    except OSError:
        lines = []
    groups = {(ROOT / v2), (ROOT / controller / v1)}  # a container's own root
    for line in lines:
        _, controllers, path = line.split(":", 2)
        base, name = (ROOT, v2) if not controllers else (ROOT / controller, v1)
        if not controllers or controller in controllers.split(","):
            inner = Path(path.lstrip("/"))
            groups |= {base / group / name for group in (inner, *inner.parents)}
    found = []
    for file in groups:
        try:
            found.append((str(file), file.read_text().strip()))
        except OSError:  # seldom all of them are visible
            continue
    return found


def memory_limit() -> int | None:
    """Bytes that this process's groups allow; None without a limit."""
    texts = _texts("memory", "memory.max", "memory.limit_in_bytes")
    # Version 1 writes "no limit" as a huge number.
    limits = [int(text) for _, text in texts if text.isdigit() and int(text) < 1 << 60]
    return min(limits, default=None)


def cpu_cores() -> float:
    """Cores that this process may use: by affinity, and by the quota of its groups."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for file, text in _texts("cpu", "cpu.max", "cpu.cfs_quota_us"):
        quota, *period = text.split()
        if not period:
            try:
                period = [Path(file).with_name("cpu.cfs_period_us").read_text().strip()]
            except OSError:
                continue
        if quota.isdigit() and period[0].isdigit() and int(quota) > 0:
            cores = min(cores, int(quota) / int(period[0]))
    return cores
