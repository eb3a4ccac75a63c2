"""wandb has every step of a run once, over all its attempts: with the real wandb, against a server on this machine."""

import json
import signal
import subprocess
import sys
import time

import pytest

from stepline.trainer.watch import wandb_logger

from .wandb_helpers import make, offline_folders, row, stored, sync

pytest.importorskip("wandb")


def test_a_resumed_run_sends_each_step_once(server, tmp_path, said):
    """Killed at step 9, resumed at step 5 by another configuration of ranks, stopped by a signal, and resumed."""
    logger = make(tmp_path)
    for step in range(1, 10):
        logger.log(row(step))
    logger.finish(1)
    logger = make(tmp_path, rows=[row(s) for s in range(1, 6)], config={"lr": 0.1, "world_size": 2})
    for step in range(6, 13):
        logger.log(row(step))
    logger.log({"step": 12, "val_loss": 3.0})
    logger.finish(75)
    run = stored(server, tmp_path)
    assert (run.exit_code, run.preempted) == (75, True)
    logger = make(tmp_path, rows=[row(s) for s in range(1, 13)], config={"lr": 0.1, "world_size": 1})
    logger.log(row(13))
    logger.finish(0)
    assert run.steps == [*range(1, 13), 12, 13]
    assert [r["val_loss"] for r in run.history if "val_loss" in r] == [3.0]
    assert run.values()["world_size"] == 1
    assert list(server.runs) == [run.name]
    assert said == []


@pytest.mark.parametrize(
    ("history", "summary"),
    [
        (6, {"step": 6, "_step": 5}),
        (6, {"step": 8, "_step": 7}),
        (0, {"step": 1, "_step": 0}),
        (0, {"step": 1}),
        (0, {}),
        (3, {"_runtime": 1}),
    ],
)
def test_what_the_server_lost_is_sent_again(server, tmp_path, history, summary):
    """The machine died before its last rows were sent: what the server holds counts. wandb sends a row's summary
    before the row, so that the summary may be ahead."""
    logger = make(tmp_path)
    for step in range(1, 10):
        logger.log(row(step))
    logger.finish(1)
    run = stored(server, tmp_path)
    lines = run.lines["wandb-history.jsonl"]
    for offset in range(history, 9):
        del lines[offset]
    run.lines["wandb-summary.json"] = {0: json.dumps(summary)}
    logger = make(tmp_path, rows=[row(s) for s in range(1, 9)])
    logger.log(row(9))
    logger.finish(0)
    assert run.steps == list(range(1, 10))


def test_a_server_that_does_not_say_how_many_rows_it_has(server, tmp_path):
    """Then its summary counts."""
    server.tells_rows = False
    logger = make(tmp_path)
    for step in range(1, 10):
        logger.log(row(step))
    logger.finish(1)
    run = stored(server, tmp_path)
    for offset in range(6, 9):
        del run.lines["wandb-history.jsonl"][offset]
    run.lines["wandb-summary.json"] = {0: json.dumps({"step": 6})}
    logger = make(tmp_path, rows=[row(s) for s in range(1, 9)])
    logger.log(row(9))
    logger.finish(0)
    assert run.steps == list(range(1, 10))


def test_the_file_of_what_was_sent_may_be_missing(server, tmp_path):
    logger = make(tmp_path)
    logger.log(row(1))
    logger.finish(75)
    (tmp_path / "wandb-sent.json").unlink()
    logger = make(tmp_path, rows=[row(1)])
    logger.log(row(2))
    logger.finish(0)
    assert stored(server, tmp_path).steps == [1, 2]


def test_an_offline_attempt_that_waits_for_its_sync_sends_nothing_twice(server, tmp_path):
    """Rows 1 to 5 lie in a folder; then two of those sent online are lost, before a resume at step 7."""
    logger = make(tmp_path, "offline")
    for step in range(1, 6):
        logger.log(row(step))
    logger.finish(75)
    logger = make(tmp_path, "online", rows=[row(s) for s in range(1, 6)])
    for step in range(6, 13):
        logger.log(row(step))
    logger.finish(75)
    run = stored(server, tmp_path)
    logger = make(tmp_path, "online", rows=[row(s) for s in range(1, 13)])
    logger.log(row(13))
    logger.finish(1)
    assert run.steps == list(range(6, 14))
    del run.lines["wandb-history.jsonl"][7], run.lines["wandb-history.jsonl"][6]
    logger = make(tmp_path, "online", rows=[row(s) for s in range(1, 8)])
    for step in range(8, 15):
        logger.log(row(step))
    logger.finish(0)
    assert run.steps == list(range(6, 15))
    sync(server, *offline_folders(tmp_path))
    assert sorted(run.steps) == list(range(1, 15))


def test_a_run_that_had_no_wandb_catches_up(server, tmp_path):
    logger = make(tmp_path, rows=[row(s) for s in range(1, 6)])
    logger.log(row(6))
    logger.finish(0)
    assert stored(server, tmp_path).steps == list(range(1, 7))


def test_wandb_sync_takes_two_offline_attempts_as_one_run(server, monkeypatch, tmp_path, said):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = {"optimizer": {"lr": 0.1}, "plan": {"steps": 7}}
    logger = make(tmp_path, config=config)
    for step in range(1, 8):
        logger.log(row(step))
    logger.alert("Spike", "a NaN", "warn")
    time.sleep(1.5)  # the machine's first sample is taken beside the run
    logger.finish(1, {"status": "failed"})
    time.sleep(1.1)  # wandb's folders are named by the second
    logger = make(tmp_path, rows=[row(s) for s in range(1, 5)], config=config)
    for step in range(5, 10):
        logger.log(row(step))
    time.sleep(1.5)
    logger.finish(0, {"status": "done"})
    assert server.runs == {}
    folders = offline_folders(tmp_path)
    assert len(folders) == 2
    assert sync(server, *folders).count("Finished syncing") == 2
    run = stored(server, tmp_path)
    assert run.steps == list(range(1, 10))
    assert [r["_step"] for r in run.history] == list(range(9))
    assert (run.values(), run.metrics()) == (config, [("step", None), ("*", "step")])
    assert (run.summary["status"], run.exit_code, run.alerts) == ("done", 0, [["Spike", "a NaN", "WARN"]])
    assert any("memory" in key for key in run.system[0])
    assert len(server.runs) == 1
    assert said == []


def test_attempts_synced_one_by_one_and_an_online_one_after_them(server, monkeypatch, tmp_path):
    for attempt in range(2):
        logger = make(tmp_path, "offline")
        logger.log(row(attempt + 1))
        logger.finish(75)
        sync(server, *offline_folders(tmp_path)[attempt:])
        time.sleep(1.1)
    logger = make(tmp_path, "online", rows=[row(1), row(2)])
    logger.log(row(3))
    logger.finish(0)
    assert stored(server, tmp_path).steps == [1, 2, 3]


def test_rows_outlive_a_machine_that_dies(server, tmp_path):
    """Two seconds after a row was logged, wandb and the run die at once: `wandb sync` has the row."""
    program = f"""
import os, signal, subprocess, sys, time
from pathlib import Path
from stepline.trainer.watch.wandb_logger import WandbLogger
logger = WandbLogger(Path(sys.argv[1]), "project", "name", {{}}, "offline")
for step in range(1, 6):
    logger.log({{"step": step, "loss": 1.0}})
time.sleep({wandb_logger.LIMITS["x_transaction_log_flush_interval"]} + 1)
core = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "wandb-core"], capture_output=True, text=True)
for pid in core.stdout.split():
    os.kill(int(pid), signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    sync(server, *offline_folders(tmp_path))
    assert stored(server, tmp_path).steps == [1, 2, 3, 4, 5]
