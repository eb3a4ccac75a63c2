"""heartbeat.json: whole at every moment, cheap, and as old as the run's last progress."""

import json
import os
import re
import socket
import time
from datetime import datetime
from pathlib import Path

import pytest

from stepline.trainer.config import Config
from stepline.trainer.watch import heartbeat
from stepline.trainer.watch.heartbeat import Heartbeat, StepTimes, end, starting

DOCUMENTATION = Path(__file__).resolve().parents[3] / "docs" / "watching.md"


class Clock:
    """A monotonic clock and a wall clock that the test moves."""

    def __init__(self):
        self.now, self.wall = 1000.0, 1.8e9

    def monotonic(self):
        return self.now

    def time(self):
        return self.wall + self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(heartbeat, "time", clock)
    return clock


def make(folder, start_step=0):
    return Heartbeat(
        folder / "heartbeat.json", steps=100, start_step=start_step, limit_s=600, attempt=2, world_size=8
    )


def read(beat):
    return json.loads(beat.path.read_text())


def test_what_the_file_says(tmp_path):
    beat = make(tmp_path, start_step=40)
    before = time.time()
    beat.beat(40, "starting", tokens=4000)
    says = read(beat)
    assert before - 0.01 <= says.pop("time") <= time.time() + 0.01
    assert abs(datetime.fromisoformat(says.pop("time_iso")).timestamp() - before) < 2
    assert says == {
        "stale_after_s": 600,
        "status": "starting",
        "step": 40,
        "steps": 100,
        "tokens": 4000,
        "loss": None,
        "tokens_per_second": None,
        "eta_s": None,
        "attempt": 2,
        "world_size": 8,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "last_checkpoint": None,
        "failed_saves": 0,
        "exit_code": None,
    }


def test_every_field_is_in_the_documentation(tmp_path):
    beat = make(tmp_path)
    beat.beat(0, "starting")
    rows = [
        line for line in DOCUMENTATION.read_text().split("## Alerts")[0].splitlines() if line[:3] == "| `"
    ]
    fields = [name for line in rows for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert set(fields) == set(read(beat))


def test_one_write_in_five_seconds_and_at_once_for_a_new_status(tmp_path, clock):
    beat = make(tmp_path)
    beat.beat(0, "starting")
    written = []
    for step in range(1, 26):
        clock.now += 1
        beat.beat(step, "training")
        written.append(read(beat)["step"])
    assert written == [1] * 5 + [6] * 5 + [11] * 5 + [16] * 5 + [21] * 5
    beat.beat(25, "validating")
    assert read(beat)["status"] == "validating"
    clock.now += 0.1
    beat.beat(25, "saving", last_checkpoint="step-000020", failed_saves=1)
    beat.beat(25, "training")
    says = read(beat)
    assert (says["status"], says["step"], says["failed_saves"]) == ("training", 25, 1)
    assert says["last_checkpoint"] == "step-000020"


def test_a_wall_clock_that_jumps_changes_nothing_but_the_time(tmp_path, clock):
    beat = make(tmp_path)
    for step in range(1, 11):
        clock.now += 10
        clock.wall += 3600 * (-1) ** step
        assert beat.beat(step, "training") == (10 if step > 1 else None)
    assert read(beat)["eta_s"] == 900


def test_time_left_and_the_age_that_means_a_stalled_run(tmp_path, clock):
    beat = make(tmp_path)
    beat.beat(0, "starting")
    assert read(beat)["stale_after_s"] == 600
    for step in range(1, 7):
        clock.now += 20
        beat.beat(step, "training")
    assert (read(beat)["stale_after_s"], read(beat)["eta_s"]) == (200, 94 * 20)
    beat.beat(6, "validating")
    assert read(beat)["stale_after_s"] == 600
    clock.now += 100
    beat.beat(6, "training")
    beat.beat(100, "done", exit_code=0)
    says = read(beat)
    assert (says["stale_after_s"], says["eta_s"], says["exit_code"]) == (None, None, 0)


def test_what_may_take_longer_than_a_hang_says_so_at_once(tmp_path, clock):
    beat = make(tmp_path)
    said = []
    for status, limit_s in (
        ("saving", 3600.06),
        ("saving", 7200),
        ("saving", 0),
        ("saving", 5),
        ("starting", 0),
    ):
        beat.beat(0, status, limit_s)
        said.append(read(beat)["stale_after_s"])
    assert said == [3600.1, 7200, 600, 600, 600]


def test_fast_steps_may_take_a_minute(tmp_path, clock):
    beat = make(tmp_path)
    for step in range(1, 30):
        clock.now += 0.2
        beat.beat(step, "training")
    assert beat.stale_after_s() == 60


def test_a_loss_that_is_not_finite_is_valid_json(tmp_path):
    beat = make(tmp_path)
    beat.fields["loss"] = float("nan")
    beat.beat(1, "training")
    assert (read(beat)["loss"], read(beat)["loss_is_finite"]) == (None, False)


def test_step_times_leave_out_what_is_no_single_step(clock):
    times = StepTimes()
    seen = []
    for seconds, step, status in [
        (9, 5, "starting"),
        (9, 6, "training"),
        (1, 7, "training"),
        (2, 8, "training"),
        (9, 8, "validating"),
        (9, 8, "saving"),
        (1, 8, "training"),
        (3, 9, "training"),
        (5, 11, "training"),
        (4, 12, "training"),
    ]:
        clock.now += seconds
        seen.append(times.tick(step, status))
    assert seen == [None, None, 1, 2, None, None, None, 3, None, 4]
    assert (times.median, times.count) == (2.5, 4)


def test_a_disk_that_refuses_is_said_once_and_tried_again(tmp_path, clock, said):
    folder = tmp_path / "gone"
    beat = make(folder)
    for step in range(20):
        clock.now += 3
        beat.beat(step, "training")
    assert said == [f"{beat.path} cannot be written (No such file or directory); the run goes on"]
    folder.mkdir()
    clock.now += 5
    beat.beat(20, "training")
    assert read(beat)["step"] == 20
    assert said[1:] == [f"{beat.path} is written again"]
    assert [path.name for path in folder.iterdir()] == ["heartbeat.json"]


def test_an_attempt_that_ends_before_it_trains(tmp_path):
    """What the attempt before has said does not stand while this one loads, nor when it ends early."""
    config = Config.model_validate(
        {
            "model": {"vocab_size": 16, "hidden_size": 8, "num_layers": 1, "num_heads": 1, "ffn_size": 8},
            "budget": {"tokens": 102400, "batch_tokens": 1024},
        }
    )
    before = make(tmp_path)
    before.beat(40, "continue", exit_code=75)
    beat = starting(tmp_path, config, 40, attempt=3, world_size=2)
    says = read(beat)
    known = [says[key] for key in ("status", "step", "steps", "tokens", "attempt", "world_size", "exit_code")]
    assert known == ["starting", 40, 100, 40960, 3, 2, None]
    assert says["stale_after_s"] == 600
    end(tmp_path, 2)
    ended = read(beat)
    changed = {"status": "stopped", "stale_after_s": None, "exit_code": 2}
    assert ended == says | {key: ended[key] for key in ("time", "time_iso")} | changed
    beat.beat(100, "done", exit_code=0)
    end(tmp_path, 2)
    assert read(beat)["status"] == "done"


def test_nothing_is_said_where_there_is_no_heartbeat(tmp_path):
    end(tmp_path, 2)
    (tmp_path / "heartbeat.json").write_text("[half")
    end(tmp_path, 2)
    assert (tmp_path / "heartbeat.json").read_text() == "[half"


def test_a_beat_costs_little(tmp_path):
    beat = make(tmp_path)
    beat.beat(0, "training")
    start = time.perf_counter()
    for step in range(1, 1001):
        beat.beat(step, "training", tokens=step)
    assert (time.perf_counter() - start) / 1000 < 1e-4  # seconds; about 2e-6 when nothing else runs
