"""wandb that never asks and never crashes: with the real wandb, against a server on this machine. Whatever happens to
it, the caller goes on."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stepline.trainer.watch import wandb_logger
from stepline.trainer.watch.metrics import MetricsFile
from stepline.trainer.watch.wandb_logger import WandbLogger

from .wandb_helpers import core, make, offline_folders, row, stored, sync
from .wandb_server import KEY

pytest.importorskip("wandb")


@pytest.mark.parametrize(
    ("mode", "env", "chosen"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "off"),
        ("auto", {"WANDB_MODE": "online"}, "offline"),
        ("auto", {"WANDB_MODE": "dryrun"}, "offline"),
        ("online", {}, "offline"),
        ("off", {"WANDB_API_KEY": KEY}, "off"),
        ("offline", {"WANDB_API_KEY": KEY}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
    ],
)
def test_modes(monkeypatch, no_key, tmp_path, said, mode, env, chosen):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(WandbLogger, "_work", lambda self: self._started.set())
    assert make(tmp_path, mode).mode == chosen
    asked_for_online = "online" in (mode, env.get("WANDB_MODE")) and "WANDB_API_KEY" not in env
    assert [s.startswith("wandb has no key") for s in said] == [True] * asked_for_online


def test_all_of_a_run_reaches_the_server(server, tmp_path, said):
    config = {"optimizer": {"lr": 0.1}, "plan": {"steps": 7, "law": "step-law"}}
    logger = make(tmp_path, config=config)
    assert logger.mode == "online"
    # as rows of an earlier attempt are: a table, which is no curve, and a value that was NaN
    load, lost = {"expert_load": [[0.5, 1.5]]}, {"grad_norm": None, "grad_norm_is_finite": False}
    logger.log(row(1, **load))
    logger.log(row(2, val_loss=3.5, expected_final_loss=3.25, **lost))
    logger.alert("Spike", "a NaN", "warn")
    logger.finish(0, {"status": "done", "loss": 0.5} | load | lost)
    run = stored(server, tmp_path)
    assert [(r["step"], r["loss"]) for r in run.history] == [(1, 1), (2, 0.5)]
    assert run.history[1]["expected_final_loss"] == 3.25
    assert run.values() == config
    assert run.metrics() == [("step", None), ("*", "step")]
    assert run.alerts == [["Spike", "a NaN", "WARN"]]
    assert (run.summary["status"], run.summary["val_loss"], run.exit_code) == ("done", 3.5, 0)
    for values in (run.history[1], run.summary):
        assert math.isnan(values["grad_norm"])
        assert not {"expert_load", "grad_norm_is_finite"} & values.keys()
    assert any("memory" in key for key in run.system[0])
    assert said == []


def test_a_dead_service_is_said_once_and_started_again(server, monkeypatch, tmp_path, said):
    monkeypatch.setattr(wandb_logger, "FIRST_PAUSE_S", 1.0)
    rows = []
    logger = make(tmp_path, rows=())
    logger._logged = lambda first: list(rows)

    def log(steps):
        for step in steps:
            rows.append(row(step))
            start = time.monotonic()
            logger.log(rows[-1])
            assert time.monotonic() - start < 0.1

    log(range(1, 6))
    os.kill(core(), signal.SIGKILL)
    deadline = time.monotonic() + 30
    step = 6
    while "wandb is back" not in said and time.monotonic() < deadline:
        log([step])
        step += 1
        time.sleep(0.05)
    log(range(step, step + 3))
    logger.finish(0)
    assert said[0].startswith("wandb is lost (")
    assert said[1:] == ["wandb is back"]
    assert stored(server, tmp_path).steps == [r["step"] for r in rows]


@pytest.mark.parametrize("written", [True, False])
def test_after_a_full_disk_wandb_is_started_again(server, monkeypatch, tmp_path, said, mount, written):
    """wandb gives up its file for good; the run's rows come from metrics.jsonl once there is space, those too that it
    had taken and not written when the disk filled up."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=4m", "none", disk)
    try:
        monkeypatch.setitem(wandb_logger.LIMITS, "x_transaction_log_flush_interval", 0.2 if written else 20.0)
        file = MetricsFile(disk / "metrics.jsonl")
        logger = WandbLogger(disk, "project", "name", {}, "offline", logged=file.read)

        def log(steps):
            for step in steps:
                waited = file.waits_from
                file.write(row(step, text="x" * 300))
                logger.log(row(step, text="x" * 300))
                if waited is None and file.waits_from is not None:
                    logger.disk_is_full()
                if waited is not None and file.waits_from is None:
                    logger.begin_again(waited)

        log(range(1, 101))
        time.sleep(1)
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={disk / 'other'}", "bs=4096"], capture_output=True, check=False
        )
        log(range(101, 400))
        time.sleep(1)
        (disk / "other").unlink()
        log(range(400, 410))
        logger.finish(0)
        folders = offline_folders(disk)
        assert len(folders) == 2
        for folder in folders:  # given together, wandb stops behind the first, whose last record is cut off
            sync(server, folder)
        steps = stored(server, disk).steps
        assert sorted(set(steps)) == list(range(1, 410))
        # a page that was still there may have held some rows
        assert len(steps) < 409 + (30 if written else 200)
        assert [s for s in said if not s.startswith(str(file.path))] == []
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_service_that_hangs_does_not_hold_up_the_run(server, monkeypatch, tmp_path, said):
    monkeypatch.setattr(wandb_logger, "FINISH_S", 2.0)
    logger = make(tmp_path)
    logger.log(row(1))
    pid = core()
    os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    for step in range(2, 2000):
        logger.log(row(step))
    assert time.monotonic() - start < 1
    logger.finish(0)
    assert time.monotonic() - start < 5
    assert said == [f"the run is not logged to wandb: it does not come to an end; {wandb_logger.KEPT}"]
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()


def test_a_server_that_hangs_at_the_end(server, monkeypatch, tmp_path, said):
    monkeypatch.setitem(wandb_logger.LIMITS, "finish_timeout", 1.0)
    logger = make(tmp_path)
    logger.log(row(1))
    server.hang.set()
    start = time.monotonic()
    logger.finish(0)
    assert time.monotonic() - start < 6
    assert len(said) == 1


@pytest.mark.parametrize("fault", ["closed port", "hangs"])
def test_an_unreachable_server_leaves_the_run_offline(server, monkeypatch, tmp_path, said, fault):
    monkeypatch.setitem(wandb_logger.LIMITS, "init_timeout", 2.0)
    monkeypatch.setattr(wandb_logger, "START_S", 0.5)
    if fault == "hangs":
        server.hang.set()
    else:
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    start = time.monotonic()
    logger = make(tmp_path)
    for step in range(1, 4):
        logger.log(row(step))
    assert time.monotonic() - start < 1.5
    logger.finish(0)
    assert [s.startswith("wandb is not reachable (") for s in said] == [True]
    assert said[0].endswith("; its files stay in the run's folder, for `wandb sync`")
    server.hang.clear()
    sync(server, *offline_folders(tmp_path))
    assert stored(server, tmp_path).steps == [1, 2, 3]


def test_wandb_that_is_not_installed(monkeypatch, tmp_path, said):
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger = make(tmp_path, "offline")
    logger.log(row(1))
    logger.finish()
    assert said == ["the run is not logged to wandb: wandb is not installed (pip install 'stepline[watch]')"]


def test_a_folder_that_cannot_be_written(monkeypatch, no_key, tmp_path, said):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run_id").mkdir()  # stands for a disk that refuses
    logger = make(tmp_path / "run", "offline")
    logger.log(row(1))
    logger.finish()
    assert [s.startswith("wandb is lost (") for s in said] == [True]
