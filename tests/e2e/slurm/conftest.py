"""A real SLURM on this machine for the time of the tests: munged, slurmctld and two slurmd."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

OVER = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
CONFIG = """
ClusterName=stepline
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=5,bf_interval=5
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=30
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF State=UP
"""
"""GraceTime: seconds that a preempted job has to save."""


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.fspath).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slurm)


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@dataclass
class Cluster:
    """Its commands; every process of it knows the folder from SLURM_CONF."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """For sbatch and the rest."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(self, *command: str) -> str:
        """Standard output of a SLURM command, which must succeed."""
        done = subprocess.run(
            command,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, of an array the first element."""
        text = self.call("scontrol", "--oneliner", "show", "job", number).splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(
        self, number: str, until: Callable[[dict[str, str]], bool], seconds: float = 240
    ) -> dict[str, str]:
        """What SLURM says of the job once `until` holds for it.

        Of the two minutes that a requeued job waits all but seconds are skipped: within the same second slurmd refuses
        it ("credential revoked").
        """
        deadline, waits_since = time.monotonic() + seconds, None
        while not until(job := self.job(number)):
            assert time.monotonic() < deadline, job
            if (job["JobState"], job["Reason"]) != ("PENDING", "BeginTime"):
                waits_since = None
            elif waits_since is None:
                waits_since = time.monotonic()
            elif time.monotonic() - waits_since > 3:
                self.call("scontrol", "update", f"JobId={number}", "StartTime=now")
            time.sleep(0.3)
        return job

    def end(self, number: str) -> tuple[str, int]:
        """Waits until the job is over; returns its last state and how often it was requeued."""
        since: list[float] = []

        def over(job: dict[str, str]) -> bool:
            """For some seconds: SLURM shows FAILED for a moment before it requeues."""
            since[:] = (since or [time.monotonic()]) if job["JobState"] in OVER else []
            return bool(since) and time.monotonic() - since[0] > 4

        job = self.wait(number, over, seconds=400)
        return job["JobState"], int(job["Restarts"])


def _processes(folder: Path) -> list[int]:
    """Daemons and what they have started, by the configuration in their environment."""
    found, mark = [], f"SLURM_CONF={folder}/slurm.conf".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found


@pytest.fixture(scope="session")
def cluster(tmp_path_factory, unavailable) -> Iterator[Cluster]:
    """Two idle nodes, n1 and n2; partitions `low` (preempted by requeue) and `high`."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        unavailable(
            f"there is no {missing[0]} here; `make test-slurm` installs slurm-wlm and munge on Debian"
        )
    if sys.platform != "linux" or os.geteuid() != 0:
        unavailable("slurmd starts jobs as root only")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    folder, host = cluster.folder, socket.gethostname().split(".")[0]
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, ports=free_ports(3)))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munged += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    daemons: list[subprocess.Popen] = []

    def start(name: str, *command: str) -> None:
        with (folder / f"{name}.out").open("w") as log:
            daemons.append(
                subprocess.Popen(
                    command,
                    env=os.environ | cluster.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def idle() -> bool:
        states = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "low", "-o", "%N %t"],
            env=os.environ | cluster.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return sorted(states.stdout.splitlines()) == ["n1 idle", "n2 idle"]

    try:
        start("munged", *munged, f"--socket={folder}/munge.socket")
        start("slurmctld", "slurmctld", "-D", "-i")
        for name in ("n1", "n2"):
            start(name, "slurmd", "-D", "-N", name)
        deadline = time.monotonic() + 60
        while not idle():
            logs = {path.name: path.read_text()[-1000:] for path in folder.glob("*.out")}
            assert time.monotonic() < deadline, logs
            assert all(daemon.poll() is None for daemon in daemons), logs
            time.sleep(0.2)
        yield cluster
    finally:
        if len(daemons) > 1:
            subprocess.run(
                ["scancel", "--user=root"], env=os.environ | cluster.environment, timeout=60, check=False
            )
        _end(cluster.folder, daemons)


def _end(folder: Path, daemons: list[subprocess.Popen]) -> None:
    """Leaves no process of the cluster behind."""
    for daemon in daemons[::-1]:
        daemon.terminate()
    for daemon in daemons:
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    for left in _processes(folder):  # steps outlive slurmd by design
        try:
            os.kill(left, signal.SIGKILL)
        except ProcessLookupError:
            continue
