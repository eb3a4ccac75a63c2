"""Progress lines, and what wandb needs to know before it starts."""

import io

import pytest

from stepline.trainer.watch import loggers
from stepline.trainer.watch.loggers import (
    Loggers,
    ProgressLogger,
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

        def alert(self, title, text, level):
            self.seen.append(title)

        def finish(self, exit_code=0, summary=None):
            self.seen.append((exit_code, summary))

    a, b = Recorder(), Recorder()
    both = Loggers(a, b)
    both.log(ROW)
    both.alert("Spike", "text", "warn")
    both.finish(3, {"loss": 1})
    assert a.seen == b.seen == [ROW, "Spike", (3, {"loss": 1})]


def test_a_logger_that_fails_is_said_once_and_left_out(said):
    class Broken:
        def log(self, row):
            raise RuntimeError("no idea")

    out = io.StringIO()
    both = Loggers(Broken(), ProgressLogger(30, stream=out))
    both.log(ROW)
    both.log(ROW)
    both.finish()
    assert len(out.getvalue().splitlines()) == 2
    assert said == ["Broken fails and is left out: no idea"]


def test_a_terminal_that_is_gone():
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    progress = ProgressLogger(30, stream=Gone())
    progress.log(ROW)
    progress.finish()


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


def test_run_id_is_made_once(tmp_path):
    first = run_id(tmp_path / "run")
    assert len(first) == 8
    assert run_id(tmp_path / "run") == first
    (tmp_path / "run" / "run_id").write_text("given\n")
    assert run_id(tmp_path / "run") == "given"
