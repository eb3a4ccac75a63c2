"""`torchrun --nnodes 1:2` on two nodes (here: two agents of one machine), of which one dies and comes back."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest

STEPS = 120


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]


def world_size(folder: Path) -> int:
    try:
        return json.loads((folder / "environment.json").read_text())["world_size"]
    except (OSError, ValueError):
        return 0


@pytest.mark.parametrize("leaves", ["killed", "told to stop"])
def test_a_node_leaves_and_comes_back(start, undisturbed, tmp_path, leaves):
    """2 -> 1 -> 2 ranks at the same global batch: the curve of two ranks that nobody disturbed, every step once.

    The node that hosts the rendezvous stays: with it the job would end.
    """
    folder, all_there = tmp_path / "run", tmp_path / "all-there"
    options, asked = (
        [f"budget.steps={STEPS}", "logging.eval_every=0"],
        "never" if leaves == "killed" else "auto",
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    elastic = ["--nnodes=1:2", "--max-restarts=5", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    elastic += ["--rdzv-id=elastic"]

    def node(is_host: int):
        conf = f"--rdzv-conf=last_call_timeout=3,is_host={is_host}"
        return start(
            folder,
            *options,
            f"--resume={asked}",  # the run of this launch, whichever of its nodes has begun it
            ranks=1,
            torchrun=[*elastic, conf],
            faults={"sleep": {"step": 0.35}, "awake": str(all_there)},
            # A store of its own for each membership: in the shared one a node that comes later waits in vain.
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )

    first, second = node(1), node(0)
    first.reach(25)
    assert world_size(folder) == 2
    if leaves == "killed":
        for pid in (*second.ranks(), second.processes[0].pid):
            os.kill(pid, signal.SIGKILL)
    else:
        second.send(signal.SIGTERM)  # its ranks, and with them those of the other node, save and leave
    second.processes[0].wait()
    first.until(lambda: world_size(folder) == 1).reach(40)
    third = node(0)
    first.until(lambda: world_size(folder) == 2)
    all_there.touch()
    assert first.end() == [0], first.text()
    assert third.end() == [0], third.text()
    mine, theirs = losses(folder), losses(undisturbed(*options))
    assert [step for step, _ in mine] == list(range(1, STEPS + 1))
    for (step, loss), (_, expected) in zip(mine, theirs, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5), step
    assert len(list((folder / "logs").iterdir())) == 3
