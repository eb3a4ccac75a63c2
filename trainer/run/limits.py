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
    return min((limit for _, limit in _memory_limits()), default=None)


def memory_left() -> int | None:
    """Bytes of the limits that are not in use yet; None without a limit."""
    return min((max(limit - _memory_used(file), 0) for file, limit in _memory_limits()), default=None)


def _memory_limits() -> list[tuple[Path, int]]:
    """The file of each limit that this process's groups have, and its bytes."""
    texts = _texts("memory", "memory.max", "memory.limit_in_bytes")
    # Version 1 writes "no limit" as a huge number.
    return [(Path(file), int(text)) for file, text in texts if text.isdigit() and int(text) < 1 << 60]


def _memory_used(limit: Path) -> int:
    """Bytes in use in the group that this file limits, without the page cache that makes way; 0 where it does not
    say."""
    name = "memory.current" if limit.name == "memory.max" else "memory.usage_in_bytes"
    try:
        used = int(limit.with_name(name).read_text())
        counts = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    # Version 1 counts the groups inside only under the second name.
    return used - int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))


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
