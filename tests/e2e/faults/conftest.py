"""Runs of two ranks that are disturbed while they go, and an undisturbed one to compare them with."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

FAULTY = str(Path(__file__).with_name("faulty.py"))
SMALL = [
    "parallel.timeout_s=60",
    "parallel.micro_batch=8",  # one micro-batch on each of two ranks
    "checkpoint.every=10",
    "logging.eval_every=20",
    "logging.eval_windows=16",
    "logging.wandb=off",
]
COMPARED = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss", "val_bits_per_byte", "skipped")


def rows(folder: Path) -> list[list]:
    """What of metrics.jsonl must not depend on what happened meanwhile."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line).get(key) for key in COMPARED] for line in lines]


def cursor(folder: Path) -> dict:
    """Where the last checkpoint stands in the data."""
    newest = max(folder.glob("checkpoints/step-*/COMPLETE")).parent
    return json.loads((newest / "state.json").read_text())["loader"]


def pids(folder: Path) -> list[int]:
    """Processes whose command line names the folder."""
    found = subprocess.run(
        ["pgrep", "-f", f"run.folder={folder}( |$)"], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


def no_orphan(folder: Path, within_s: float = 10) -> None:
    """Fails where a process of the run is still there after a while."""
    deadline = time.monotonic() + within_s
    while pids(folder):
        assert time.monotonic() < deadline, f"processes of {folder} are left: {pids(folder)}"
        time.sleep(0.1)


def _hear_signals() -> None:
    """In a child: a shell that started the tests in the background, or nohup, has switched these off for it."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@dataclass
class Run:
    """Processes of one attempt."""

    folder: Path
    processes: list[subprocess.Popen]
    output: Path
    outputs: list = field(default_factory=list)

    def reach(self, step: int, timeout: float = 90) -> "Run":
        """Waits until metrics.jsonl has this step."""
        return self.until(lambda: any(row[0] >= step for row in self._rows()), timeout)

    def until(self, condition, timeout: float = 90) -> "Run":
        """Waits for anything, as long as a process lives."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert any(p.poll() is None for p in self.processes), self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)
        return self

    def _rows(self) -> list[list]:
        try:
            return rows(self.folder)
        except (OSError, ValueError):  # not begun, or a half-written line
            return []

    def send(self, number: int, who: int = 0) -> "Run":
        """A signal to one process: a rank, or torchrun's agent where that is process 0."""
        self.processes[who].send_signal(number)
        return self

    def ranks(self) -> list[int]:
        """Process ids of the ranks below the agent, by rank."""
        agent = self.processes[0].pid
        found = subprocess.run(["pgrep", "-P", str(agent)], capture_output=True, text=True, check=False)
        ranks = {}
        for pid in found.stdout.split():
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = [v for v in environment if v.startswith(b"RANK=")]
            if rank:
                ranks[int(rank[0].removeprefix(b"RANK="))] = int(pid)
        return [ranks[r] for r in sorted(ranks)]

    def end(self, timeout: float = 120) -> list[int]:
        """Exit codes of all processes; nothing of the run is left afterwards."""
        codes = [p.wait(timeout) for p in self.processes]
        no_orphan(self.folder)
        return codes

    def kill(self) -> None:
        """SIGKILL to everything."""
        for pid in {*pids(self.folder), *(p.pid for p in self.processes if p.poll() is None)}:
            os.kill(pid, signal.SIGKILL)
        self.end()

    def outcome(self) -> dict:
        return json.loads((self.folder / "outcome.json").read_text())

    def text(self) -> str:
        """All output and logs."""
        logs = sorted(self.folder.glob("logs/attempt-*/rank-*.log"))
        return "\n".join(f"== {p}\n{p.read_text(errors='replace')[-6000:]}" for p in [self.output, *logs])


@pytest.fixture
def start(data, tmp_path):
    """Starts two ranks, by themselves or below torchrun, with faults where given."""
    runs: list[Run] = []

    def begin(
        folder: Path,
        *options: str,
        ranks: int = 2,
        torchrun: list[str] | None = None,
        faults=None,
        **env: str,
    ) -> Run:
        program = [FAULTY] if faults is not None else ["-m", "stepline.trainer"]
        arguments = [
            *program,
            "train",
            "tiny",
            f"data.path={data}",
            *SMALL,
            *options,
            f"run.folder={folder}",
        ]
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | env
        if faults is not None:
            env["FAULTS"] = json.dumps({"once": str(tmp_path / "happened")} | faults)
        output = tmp_path / f"output-{len(runs)}.txt"
        log = output.open("w")
        common = {
            "stdin": subprocess.DEVNULL,
            "stdout": log,
            "stderr": subprocess.STDOUT,
            "preexec_fn": _hear_signals,
        }
        if torchrun is not None:
            launcher = ["-m", "torch.distributed.run", *torchrun, "--nproc-per-node", str(ranks)]
            processes = [subprocess.Popen([sys.executable, *launcher, *arguments], env=env, **common)]
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            env |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            processes = [
                subprocess.Popen(
                    [sys.executable, *arguments], env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, **common
                )
                for r in range(ranks)
            ]
        runs.append(Run(folder, processes, output))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


@pytest.fixture(scope="session")
def undisturbed(sh, data, tmp_path_factory):
    """The folder of a run of two ranks with these options that nobody disturbs; made once."""

    @functools.cache
    def run(*options: str) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        train = ["-m", "stepline.trainer", "train", "tiny", f"data.path={data}", *SMALL, *options]
        sh(*launch, *train, f"run.folder={folder}")
        return folder

    return run


@pytest.fixture
def same(undisturbed):
    """Asserts that a finished run is the undisturbed one: every step once, every number and the data alike."""

    def check(folder: Path) -> None:
        straight = undisturbed()
        assert rows(folder) == rows(straight)
        assert cursor(folder) == cursor(straight)
        assert json.loads((folder / "outcome.json").read_text())["status"] == "done"

    return check
