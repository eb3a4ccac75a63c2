"""Progress lines, and wandb that never asks, never crashes and keeps one id."""

import io
import os
import sys
import time
import types

import pytest

from stepline.trainer.watch import loggers
from stepline.trainer.watch.loggers import (
    Loggers,
    ProgressLogger,
    WandbLogger,
    describe_row,
    format_seconds,
    has_key,
    run_id,
)

ROW = {
    "step": 10,
    "tokens": 81920,
    "loss": 3.14159,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "tokens_per_second": 12345.6,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


class FakeRun:
    def __init__(self, fail_at=None):
        self.rows, self.metrics, self.exit_code, self.fail_at = [], [], None, fail_at
        self.summary = {}

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, row):
        if self.fail_at == len(self.rows):
            raise ConnectionError("the service went away\nand a long story")
        self.rows.append(row)

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def fake(monkeypatch, no_key):
    """A wandb module that records the calls of init and can fail online."""
    module = types.SimpleNamespace(calls=[], broken=(), run=FakeRun(), torn_down=0)

    def init(**kwargs):
        module.calls.append(kwargs)
        if kwargs["mode"] in module.broken:
            raise RuntimeError("timed out")
        return module.run

    def teardown():
        module.torn_down += 1

    module.init, module.teardown = init, teardown
    module.Settings, module.setup = dict, lambda settings: None
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def make(folder, mode="auto"):
    said = io.StringIO()
    return WandbLogger(folder, "project", "name", {"lr": 0.1}, mode=mode, stream=said), said


def test_plain_lines(monkeypatch):
    clock = iter([100.0, 150.0])
    monkeypatch.setattr(loggers.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    progress = ProgressLogger(total_steps=30, stream=out)
    progress.log(ROW)
    progress.log(ROW | {"step": 20, "skipped": 2, "mfu": 0.473, "loss": None})
    progress.log({"step": 20, "val_loss": 3.2, "val_bits_per_byte": 1.91})
    progress.finish()
    assert out.getvalue().splitlines() == [
        "step 10/30  loss 3.1416  lr 0.001  norm 0.5  12,346 tok/s",
        "step 20/30  lr 0.001  norm 0.5  12,346 tok/s  MFU 47.3%  2 skipped  50s left",
        "step 20/30  val loss 3.2000  1.9100 bits/byte",
    ]


def test_live_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    out = Terminal()
    progress = ProgressLogger(total_steps=30, start_step=5, stream=out)
    progress.log(ROW)
    progress.log({"step": 10, "val_loss": 3.2})
    progress.finish()
    assert "10/30" in out.getvalue()
    assert describe_row(ROW) in out.getvalue()
    assert "step 10  val loss 3.2000" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (200, "3m20s"), (18420, "5h07m"), (187200, "2d04h")],
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


def test_fan_out():
    class Recorder:
        def __init__(self):
            self.seen = []

        def log(self, row):
            self.seen.append(row)

        def finish(self, exit_code=0, summary=None):
            self.seen.append(exit_code)

    a, b = Recorder(), Recorder()
    both = Loggers(a, b)
    both.log(ROW)
    both.finish(3)
    assert a.seen == b.seen == [ROW, 3]


def test_a_key_is_found_where_wandb_would_find_it(monkeypatch, tmp_path, no_key):
    assert not has_key()
    (tmp_path / "netrc").write_text("machine example.org\n login user\n password x\n")
    assert not has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n login user\n password abc\n")
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    assert has_key()


@pytest.mark.parametrize(
    ("mode", "env", "chosen"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "off"),
        ("auto", {"WANDB_MODE": "online"}, "offline"),
        ("online", {}, "offline"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("off", {"WANDB_API_KEY": "k"}, "off"),
    ],
)
def test_modes(fake, monkeypatch, tmp_path, mode, env, chosen):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    logger, said = make(tmp_path, mode)
    assert logger.mode == chosen
    assert [call["mode"] for call in fake.calls] == ([] if chosen == "off" else [chosen])
    asked_for_online = "online" in (mode, env.get("WANDB_MODE")) and "WANDB_API_KEY" not in env
    assert said.getvalue().startswith("wandb has no key") == asked_for_online


def test_rows_config_and_id_reach_wandb(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    logger, said = make(tmp_path)
    logger.log(ROW)
    logger.finish(75)
    assert (fake.run.rows, fake.run.exit_code) == ([ROW], 75)
    assert fake.run.metrics == [("step", None), ("*", "step")]
    call = fake.calls[0]
    assert (call["project"], call["name"], call["config"]) == ("project", "name", {"lr": 0.1})
    assert (call["id"], call["resume"]) == ((tmp_path / "run_id").read_text().strip(), "allow")
    make(tmp_path)
    assert fake.calls[1]["id"] == call["id"]
    assert said.getvalue() == ""


def test_a_service_that_is_away_leaves_the_run_offline(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    fake.broken = ("online",)
    logger, said = make(tmp_path)
    logger.log(ROW)
    assert [call["mode"] for call in fake.calls] == ["online", "offline"]
    assert (logger.mode, fake.run.rows, fake.torn_down) == ("offline", [ROW], 1)
    assert said.getvalue().splitlines() == [
        "wandb is not reachable (timed out); its files stay in the run's folder, for `wandb sync`"
    ]


def test_any_failure_is_said_once_and_ends_the_logging(fake, monkeypatch, tmp_path):
    fake.broken = ("offline",)
    logger, said = make(tmp_path)
    assert (logger.mode, said.getvalue()) == ("off", "the run is not logged to wandb: timed out\n")
    logger.log(ROW)
    logger.finish()

    fake.broken, fake.run = (), FakeRun(fail_at=1)
    logger, said = make(tmp_path)
    for _ in range(4):
        logger.log(ROW)
    logger.finish()
    assert len(fake.run.rows) == 1
    assert said.getvalue() == "the run is not logged to wandb: the service went away\n"

    monkeypatch.setitem(sys.modules, "wandb", None)
    logger, said = make(tmp_path)
    logger.log(ROW)
    assert "wandb is not installed" in said.getvalue()


def test_run_id_is_made_once(tmp_path):
    first = run_id(tmp_path / "run")
    assert len(first) == 8
    assert run_id(tmp_path / "run") == first
    (tmp_path / "run" / "run_id").write_text("given\n")
    assert run_id(tmp_path / "run") == "given"


def test_the_real_wandb_offline(no_key, tmp_path):
    pytest.importorskip("wandb")
    logger, said = make(tmp_path)
    logger.log(ROW)
    logger.finish()
    assert (logger.mode, said.getvalue()) == ("offline", "")
    ident = (tmp_path / "run_id").read_text().strip()
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{ident}/run-{ident}.wandb"))
    deadline = time.monotonic() + 20
    while b"tokens_per_second" not in files[0].read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert b"tokens_per_second" in files[0].read_bytes()
    assert os.environ.get("WANDB_API_KEY") is None
