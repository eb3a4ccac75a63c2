"""metrics.jsonl: valid JSON always, every step once after any interruption."""

import errno
import json
import math
import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepline.trainer.errors import UserError
from stepline.trainer.watch import metrics
from stepline.trainer.watch.metrics import MetricsFile, read_metrics


def steps(path):
    return [row["step"] for row in read_metrics(path)]


def strict(text):
    def refuse(constant):
        raise ValueError(constant)

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_rows_are_on_disk_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1, "loss": 2.5})
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}]
    file.write({"step": 2, "loss": 2.25, "note": "ü"})
    assert read_metrics(path)[1] == {"step": 2, "loss": 2.25, "note": "ü"}


def test_values_that_json_does_not_know(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    assert strict(path.read_text()) == [
        {
            "step": 1,
            "loss": None,
            "loss_is_finite": False,
            "grad_norm": None,
            "grad_norm_is_finite": False,
            "lr": 0.1,
        }
    ]


def test_resume_drops_later_rows_and_writes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(1, 8):
        file.write({"step": step})
        if step % 3 == 0:
            file.write({"step": step, "val_loss": 1.0})
    file.truncate_after(4)
    for step in range(5, 8):
        file.write({"step": step})
    assert steps(path) == [1, 2, 3, 3, 4, 5, 6, 7]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@given(cut=st.integers(0, 200), resume=st.integers(0, 9))
def test_any_cut_leaves_every_step_once(tmp_path_factory, cut, resume):
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(1, 9):
        file.write({"step": step, "loss": 1 / step})
    file.close()
    path.write_bytes(path.read_bytes()[:cut])
    whole = path.read_bytes().count(b"\n")
    assert steps(path)[:whole] == list(range(1, whole + 1))

    again = MetricsFile(path)
    again.truncate_after(resume)
    kept = steps(path)
    assert kept == [s for s in range(1, 9) if s <= resume][: len(kept)]
    again.write({"step": 99})
    assert steps(path) == [*kept, 99]


def test_appending_without_truncation_drops_the_half_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    MetricsFile(path).write({"step": 2})
    assert steps(path) == [1, 2]


def test_a_resume_keeps_the_last_value_of_each_key(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1, "b": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3, "c": 3}\n')
    assert MetricsFile(path).truncate_after(2) == {"step": 2, "a": 2, "b": 1}
    assert steps(path) == [1, 2]


def test_a_value_that_is_finite_again_loses_its_mark(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step, loss in enumerate([5.0, math.nan, 4.0, math.nan], 1):
        file.write({"step": step, "loss": loss})
    lost = {"step": 4, "loss": None, "loss_is_finite": False}
    assert [file.truncate_after(step) for step in (4, 3)] == [lost, {"step": 3, "loss": 4.0}]


@pytest.mark.parametrize("end", ["", "\n", '\n{"step": 9, "lo', '\n{"step": 9}'])
def test_a_later_row_before_one_that_stays(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 7}\n\n{"step": 2}' + end)
    file = MetricsFile(path)
    file.truncate_after(4)
    file.write({"step": 5})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 5}\n'


def test_a_fresh_start_has_nothing_to_truncate(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl").truncate_after(0)
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path):
    with pytest.raises(UserError, match=r"none.jsonl does not exist"):
        read_metrics(tmp_path / "none.jsonl")
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nwhat\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2, is not a JSON object"):
        read_metrics(path)


@pytest.fixture
def small_disk(tmp_path, mount):
    """A disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=64k", "none", disk)
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(path):
    """Takes all that is left of the disk, but for less than a page."""
    done = subprocess.run(["dd", "if=/dev/zero", f"of={path}", "bs=4096"], capture_output=True, check=False)
    assert b"No space left" in done.stderr


def test_a_full_disk_costs_no_row(small_disk, said):
    path = small_disk / "metrics.jsonl"
    file = MetricsFile(path)
    rows = [{"step": step, "loss": 1 / step, "text": "x" * 300} for step in range(1, 121)]
    file.write(rows[0])
    fill(small_disk / "other")
    for row in rows[1:100]:
        file.write(row)
    on_disk = path.read_bytes()
    assert len(on_disk) <= 4096  # one page was there
    assert [f"{path} cannot be written (No space left on device); its rows wait, the run goes on"] == said
    (small_disk / "other").unlink()
    for row in rows[100:]:
        file.write(row)
    file.close()
    assert strict(path.read_text()) == rows
    waited = 101 - (on_disk.count(b"\n"))
    assert said[1:] == [f"{path} is written again, with the {waited} rows that waited"]


def test_a_full_disk_at_a_resume(small_disk, said):
    """Later rows are cut off without a byte of new space, and the page that they held is used again."""
    path = small_disk / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "text": "x" * 80}) + "\n" for step in range(1, 31)))
    fill(small_disk / "other")
    file = MetricsFile(path)
    assert file.truncate_after(20) == {"step": 20, "text": "x" * 80}
    assert steps(path) == list(range(1, 21))
    file.write({"step": 21})
    assert steps(path) == list(range(1, 22))
    assert said == []


def test_what_stays_lost_is_said_at_the_end(small_disk, said):
    path = small_disk / "metrics.jsonl"
    fill(small_disk / "other")
    file = MetricsFile(path)
    for step in range(1, 100):
        file.write({"step": step, "text": "x" * 80})
    file.close()
    kept = len(read_metrics(path)) if path.exists() else 0
    assert said[1:] == [f"{path} lacks its last {99 - kept} rows (steps {kept + 1} to 99)"]


def test_a_folder_that_becomes_read_only(tmp_path, said, mount):
    """An overmount of the folder, as when a disk is mounted anew without the right to write."""
    run = tmp_path / "run"
    run.mkdir()
    path = run / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1})
    mount("--bind", run, run)
    try:
        mount("-o", "remount,bind,ro", run)
        for step in (2, 3):
            file.write({"step": step})
        assert steps(path) == [1]
        assert said == [f"{path} cannot be written (Read-only file system); its rows wait, the run goes on"]
        mount("-o", "remount,bind,rw", run)
        file.write({"step": 4})
    finally:
        subprocess.run(["umount", run], check=True)
    file.close()
    assert steps(path) == [1, 2, 3, 4]
    assert said[1:] == [f"{path} is written again, with the 3 rows that waited"]


def test_a_resume_into_a_folder_that_is_read_only_for_a_while(tmp_path, said, mount):
    run = tmp_path / "run"
    run.mkdir()
    path = run / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.5}\n{"step"')
    file = MetricsFile(path)
    mount("--bind", run, run)
    try:
        mount("-o", "remount,bind,ro", run)
        assert file.truncate_after(2) == {"step": 2}
        file.write({"step": 3, "loss": 0.25})
        mount("-o", "remount,bind,rw", run)
        file.write({"step": 4})
    finally:
        subprocess.run(["umount", run], check=True)
    assert read_metrics(path)[2:] == [{"step": 3, "loss": 0.25}, {"step": 4}]
    assert steps(path) == [1, 2, 3, 4]


@given(
    cuts=st.lists(st.integers(0, 200), max_size=12), late=st.lists(st.booleans(), min_size=12, max_size=12)
)
def test_writes_that_break_off_anywhere(tmp_path_factory, cuts, late):
    """Each failing write leaves any part of its bytes; or the error comes when the file is closed, all bytes there."""
    path = tmp_path_factory.mktemp("broken") / "metrics.jsonl"
    broken = iter(zip(cuts, late, strict=False))
    fault = {}

    def write(fd, data):
        if (next_fault := next(broken, None)) is None:
            return os.write(fd, data)
        cut, at_close = next_fault
        if at_close:
            fault["close"] = True
            return os.write(fd, data)
        os.write(fd, data[:cut])
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(fd):
        os.close(fd)
        if fault.pop("close", False):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        names = {name: getattr(os, name) for name in dir(os) if not name.startswith("__")}
        patch.setattr(
            metrics,
            "os",
            type("os", (), names | {"write": staticmethod(write), "close": staticmethod(close)}),
        )
        file = MetricsFile(path)
        for step in range(1, 9):
            file.write({"step": step, "loss": 1 / step})
        for _ in range(13):
            file.close()
    assert steps(path) == list(range(1, 9))


def test_a_file_that_is_taken_away_begins_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1})
    file.write({"step": 2})
    path.unlink()
    file.write({"step": 3})
    assert steps(path) == [3]
