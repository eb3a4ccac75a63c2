"""A signal on any rank, at any moment: all ranks agree, save and leave, and the run goes on as if nothing had been."""

import json
import os
import signal
import time

import pytest

STANDALONE = ["--standalone"]


@pytest.mark.parametrize(
    ("number", "who", "moment", "step"),
    [
        (signal.SIGTERM, 1, "training", 15),
        (signal.SIGINT, 0, "validation", 20),
        (signal.SIGUSR1, 1, "validation", 60),  # the last one, of the whole split
        (signal.SIGUSR1, 0, "save", 10),
        (signal.SIGHUP, 1, "save", 30),
        (signal.SIGTERM, 0, "first_step", 1),
        (signal.SIGUSR1, 1, "start", 0),
    ],
)
def test_all_ranks_save_and_leave(start, same, tmp_path, number, who, moment, step):
    folder = tmp_path / "run"
    slow = {"validation": {"validation": 0.3}, "save": {"save": 1.5}, "first_step": {"first_step": 3}}
    run = start(folder, faults={"sleep": slow.get(moment, {"step": 0.05})})
    if moment == "start":  # before torch is imported
        time.sleep(1.0)
    elif moment == "first_step":
        run.until(lambda: "linear layers" in run.text())
        time.sleep(1)
    elif moment == "validation":
        run.reach(step).until(
            lambda: json.loads((folder / "heartbeat.json").read_text())["status"] == "validating"
        )
    elif moment == "save":
        run.until((folder / "checkpoints" / f"step-{step:06}").exists)
    else:
        run.reach(step)
    run.send(number, who)
    assert run.end() == [75, 75], run.text()
    outcome = run.outcome()
    assert (outcome["status"], outcome["exit_code"]) == ("continue", 75)
    assert number.name in outcome["message"]
    if moment == "validation":
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["step"] == step
        assert "val_loss" not in last, "the validation was not interrupted"
    if moment == "start":
        assert not (folder / "checkpoints").exists()
    assert start(folder).end() == [0, 0]
    same(folder)


@pytest.mark.parametrize(
    ("number", "who", "options"),
    [
        (signal.SIGTERM, "agent", []),
        (signal.SIGUSR1, "agent", ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"]),
        (signal.SIGUSR1, "rank", ["--max-restarts=1"]),
        (signal.SIGKILL, "agent", []),
    ],
)
def test_under_torchrun(start, same, tmp_path, number, who, options):
    """Whoever gets the signal; ranks outlive their agent only until they have saved, and are not restarted."""
    folder = tmp_path / "run"
    faults = {"sleep": {"step": 0.05}} if who == "rank" else None  # time to find the rank
    run = start(folder, torchrun=[*STANDALONE, *options], faults=faults).reach(15)
    if who == "agent":
        run.send(number)
    else:
        os.kill(run.ranks()[1], number)
    assert run.end() == [-signal.SIGKILL if number == signal.SIGKILL else 1]
    assert run.outcome()["status"] == "continue"
    assert start(folder).end() == [0, 0]
    same(folder)


def test_second_interrupt_leaves_at_once(start, tmp_path):
    """Also while the main thread waits in a collective for a rank that hangs."""
    run = start(tmp_path / "run", faults={"hang": {"12": 1}}).reach(12)
    time.sleep(0.5)
    run.send(signal.SIGINT)
    time.sleep(1)
    assert run.processes[0].poll() is None, "one interrupt waits for the step's end"
    run.send(signal.SIGINT)
    assert run.processes[0].wait(5) == 130
    assert "leaving without saving" in run.text()
