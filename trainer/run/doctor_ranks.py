"""The doctor's checks between ranks: do they meet, are they alike, what do their links carry."""

import functools
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stepline.comm.mesh import World
from stepline.comm.probe import Meeting, Rates, all_reduce_rates
from stepline.trainer.plan.sync_choice import rule
from stepline.trainer.run.doctor_machine import GB
from stepline.trainer.run.doctor_report import Check, look, name_ranks, reason
from stepline.trainer.run.folder import nearest_folder

GPU_BYTES, CPU_BYTES = 64_000_000, 16_000_000
"""Size of the large all-reduce."""
MUST_AGREE = ("torch", "stepline", "cuda", "nccl")
MAY_DIFFER = ("python", "numpy", "device")
SLOW_NCCL = 2e9
"""Bus bandwidth in bytes/s below which NCCL has taken a way that is not meant for training."""
SEEN_S = 5.0
"""How long a file of another rank may take to appear on a network file system."""


@dataclass(frozen=True)
class Site:
    """Where and how the doctor looks."""

    world: World
    device: torch.device
    folder: Path
    """Where runs are kept."""
    thorough: bool
    timeout_s: float


@dataclass
class Talk:
    """What came of the talk between the ranks, as one rank saw it."""

    checks: list[Check] = field(default_factory=list)
    readings: list[dict | None] = field(default_factory=list)
    """Of each rank, None where it did not come; on rank 0 only."""


def facts(site: Site, code: dict[str, str]) -> dict[str, Any]:
    """What this rank is, in plain values."""
    gpu = site.device.type == "cuda"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpu and dist.is_nccl_available() else None
    import numpy

    return {
        "rank": site.world.rank,
        "host": platform.node(),
        "device": torch.cuda.get_device_name(site.device) if gpu else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
        "nccl": nccl,
        "stepline": f"{code['version']} {code['source']}",
        "free_bytes": _free_bytes(site.folder),
    }


def _free_bytes(folder: Path) -> int | None:
    try:
        system = os.statvfs(nearest_folder(folder))
    except OSError:
        return None
    return system.f_bavail * system.f_frsize


def check_alike(readings: list[dict | None]) -> Check:
    """Names what differs between the ranks, and which have not come."""
    here = {rank: reading for rank, reading in enumerate(readings) if reading is not None}
    hosts: dict[str, list[int]] = {}
    for rank, reading in here.items():
        hosts.setdefault(reading["host"], []).append(rank)
    value = {"size": len(readings), "hosts": hosts, "differ": {}}
    lost = [rank for rank, reading in enumerate(readings) if reading is None]
    clauses = [f"{name_ranks(lost)} did not answer, look at their output"] if lost else []
    status = "broken" if lost else "ok"
    for key in (*MUST_AGREE, *MAY_DIFFER):
        groups: dict[str, list[int]] = {}
        for rank, reading in here.items():
            groups.setdefault(str(reading[key]), []).append(rank)
        if len(groups) > 1:
            value["differ"][key] = groups
            named = ", ".join(f"{what} on {name_ranks(ranks)}" for what, ranks in groups.items())
            clauses.append(f"{key} is {named}{'' if key in MAY_DIFFER else ', install the same'}")
            status = "broken" if key in MUST_AGREE or status == "broken" else "warning"
    free = {
        rank: reading["free_bytes"] for rank, reading in here.items() if reading["free_bytes"] is not None
    }
    if free and max(free.values()) - min(free.values()) > max(GB, 0.1 * max(free.values())):
        least, most = min(free, key=free.get), max(free, key=free.get)
        value["differ"]["free_bytes"] = {str(rank): [rank] for rank in (least, most)}
        clauses.append(
            f"free disk is {free[least] / GB:.1f} GB on rank {least} and {free[most] / GB:.1f} GB on rank {most}"
        )
        status = "warning" if status == "ok" else status
    if not clauses:
        clauses = [f"{len(readings)} on {len(hosts)} machine{'s' if len(hosts) > 1 else ''}, all alike"]
    return Check("ranks", status, value, "; ".join(clauses))


def check_shared(seen: dict[int, bool], folder: Path) -> Check:
    """Whether every rank finds what rank 0 writes where runs are kept."""
    blind = [rank for rank, sees in seen.items() if not sees]
    value = {"folder": str(folder), "not_on": blind}
    if blind:
        says = f"{name_ranks(blind)} does not see" if len(blind) == 1 else f"{name_ranks(blind)} do not see"
        says += f" {folder} of rank 0: a checkpoint needs one folder for all, put run.folder on a shared disk"
        return Check("shared folder", "broken", value, says)
    return Check("shared folder", "ok", value, f"all ranks see {folder}")


def talk(site: Site, mine: dict[str, Any]) -> Talk:
    """Meets the other ranks, tells them `mine`, and measures all-reduces; no failure raises.

    The readings come through the launcher's store, so that rank 0 names what is wrong also where gloo or NCCL fail.
    """
    world, told = site.world, Talk(readings=[mine] if site.world.rank == 0 else [])
    joined: list[Meeting] = []
    # Another program at that port may take the connection and never answer.
    why = within(site.timeout_s + 1, lambda: joined.append(Meeting.join(world, site.timeout_s)))
    if why is not None:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        why = "the port is in use" if "EADDRINUSE" in why else why
        says = (
            f"rank {world.rank} cannot meet the others at {address} ({why}): choose another address or port"
        )
        told.checks.append(Check("ranks", "broken", {"address": address}, says))
        return told
    meeting = joined[0]
    told.readings = meeting.gather("reading", mine)
    complete = meeting.tell("complete", None not in told.readings)
    if world.size > 1 and complete:
        mine["clock_skew_s"] = meeting.clock_skew()
        mine["sees_folder"] = sees_folder(meeting, site.folder)
    if complete:
        machines = meeting.tell("machines", len({reading["host"] for reading in told.readings}))
        told.checks += measure(meeting, site, machines or 1)
    told.readings = meeting.gather("end", mine | {"talk": [vars(check) for check in told.checks]})
    return told


def sees_folder(meeting: Meeting, folder: Path) -> bool:
    """Whether this rank finds the hidden file that rank 0 makes for a moment where runs are kept."""
    there = nearest_folder(folder)
    name, word = f".doctor-{secrets.token_hex(4)}", secrets.token_hex(8)
    made = False
    if meeting.rank == 0:
        try:
            (there / name).write_text(word)
            made = True
        except OSError:  # said by the check of the disk
            pass
    made, name, word = meeting.tell("file", [made, name, word]) or (False, "", "")
    sees = not made or _finds(there / name, word)
    meeting.gather("seen", sees)
    if meeting.rank == 0 and made:
        (there / name).unlink(missing_ok=True)
    return sees


def _finds(file: Path, word: str) -> bool:
    deadline = time.monotonic() + SEEN_S
    while True:
        try:
            os.listdir(file.parent)  # makes a network file system look again
            return file.read_text() == word
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)


def measure(meeting: Meeting, site: Site, machines: int) -> list[Check]:
    """The backends that a training uses on this device, and what they carry; machines: that the ranks are on."""
    rates: dict[str, Rates] = {}

    def use(backend: str, device: torch.device, size: int) -> str | None:
        """Why a group with an all-reduce did not work."""

        def work() -> None:
            with meeting.process_group(backend, device):
                rates[backend] = all_reduce_rates(device, size)

        return within(site.timeout_s, work)

    cpu = torch.device("cpu")
    checks = [check_backend("gloo", use("gloo", cpu, CPU_BYTES), None)]
    if site.device.type == "cuda":
        why = use("nccl", site.device, GPU_BYTES) if dist.is_nccl_available() else "torch is built without it"
        version = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None
        checks.append(check_backend("nccl", why, version))
    else:
        checks.append(Check("nccl", "missing", None, "not needed without a GPU"))
    backend = "nccl" if site.device.type == "cuda" else "gloo"
    checks.append(check_all_reduce(backend, rates.get(backend)))
    if checks[-1].status in ("ok", "warning"):
        on_cpu = functools.partial(check_sync, cpu=site.device.type == "cpu")
        checks.append(look("sync", on_cpu, rates[backend], machines))
    return checks


def within(seconds: float, work: Callable[[], None]) -> str | None:
    """Why `work` failed, or that it took longer: then its thread is left alone, and the process ends by os._exit."""
    failed: list[str] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            failed.append(reason(error))

    thread = threading.Thread(target=run, name=HANGS, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return f"no answer in {seconds:.0f} s"
    return failed[0] if failed else None


HANGS = "doctor-measure"
"""Name of a thread that may never end."""


def hangs() -> bool:
    """Whether a measurement is still under way, so that the interpreter cannot end in order."""
    return any(thread.name == HANGS for thread in threading.enumerate())


def check_backend(name: str, why: str | None, version: str | None) -> Check:
    """A backend that a training needs on this device: did a group with it form.

    why: the reason if not.
    """
    value = {"version": version, "works": why is None}
    if why is not None:
        variable = f"{name.upper()}_SOCKET_IFNAME"
        says = f"no process group ({why}): name the network interface by {variable}"
        says += ", and see what NCCL_DEBUG=INFO prints" if name == "nccl" else ""
        return Check(name, "broken", value, says)
    return Check(name, "ok", value, f"a process group forms{f', version {version}' if version else ''}")


def check_all_reduce(backend: str, rates: Rates | None) -> Check:
    """Bandwidth and latency in words."""
    name = "all-reduce"
    if rates is None:
        return Check(name, "missing", None, f"not measured, as {backend} did not work")
    if not rates.exact:
        says = f"sums over {backend} are wrong: the links damage data, try NCCL_P2P_DISABLE=1"
        return Check(name, "broken", {"backend": backend, "exact": False}, says)
    if rates.ranks == 1:
        return Check(name, "missing", None, "one rank: start the doctor by torchrun to measure")
    speed = rates.bus_bytes_per_s
    value = {
        "backend": backend,
        "ranks": rates.ranks,
        "bytes": rates.bytes,
        "seconds": rates.seconds,
        "bus_bytes_per_s": speed,
        "latency_s": rates.latency_s,
        "exact": True,
    }
    says = f"{rates.bytes / 1e6:.0f} MB in {rates.seconds * 1e3:.1f} ms, {speed / GB:.2f} GB/s on the bus"
    says += f", one number in {rates.latency_s * 1e6:.0f} µs ({backend})"
    if backend == "nccl" and speed < SLOW_NCCL:
        says += ": slow for sharding, see by NCCL_DEBUG=INFO which way it takes"
        return Check(name, "warning", value, says)
    return Check(name, "ok", value, says)


def check_sync(rates: Rates, nodes: int, *, cpu: bool = False) -> Check:
    """Which `parallel.sync` the measured bandwidth asks for, between machines where there are several.

    A ring over all ranks crosses each machine's link as often as one over the machines alone.
    """
    between = f"{nodes} machines" if nodes > 1 else f"{rates.ranks} ranks of this machine"
    replicas = nodes if nodes > 1 else rates.ranks
    value, says = rule(rates.bus_bytes_per_s * 8 / 1e6, replicas, between, cpu=cpu)
    return Check("sync", "ok", value, says)
