"""Watch: rows, heartbeat and alerts together, on rank 0 only; and what is worth an alert."""

import json
import math

import pytest

from stepline.trainer.config import Config
from stepline.trainer.watch import alerts, heartbeat
from stepline.trainer.watch.alerts import Alerts
from stepline.trainer.watch.metrics import read_metrics
from stepline.trainer.watch.watch import Watch


@pytest.fixture
def sent():
    return []


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

        def time(self):
            return 1.8e9 + self.now

    clock = Clock()
    monkeypatch.setattr(alerts, "time", clock)
    monkeypatch.setattr(heartbeat, "time", clock)
    return clock


def alerts_for(sent, **options):
    return Alerts(lambda *alert: sent.append(alert), **options)


def config(**logging):
    """100 steps of 1024 tokens."""
    model = {"vocab_size": 16, "hidden_size": 8, "num_layers": 1, "num_heads": 1, "ffn_size": 8}
    budget = {"tokens": 102400, "batch_tokens": 1024}
    return Config.model_validate({"model": model, "budget": budget, "logging": {"wandb": "off"} | logging})


def beat_of(folder):
    return json.loads((folder / "heartbeat.json").read_text())


def test_a_spike_is_said_when_the_guard_has_skipped_more(sent, said, clock):
    watch = alerts_for(sent, skipped=2)
    for step, skipped in [(1, 2), (2, 3), (3, 3), (4, 5)]:
        watch.row({"step": step, "skipped": skipped})
        clock.now += alerts.AGAIN_S
    assert sent == [
        ("Spike", "a NaN or a spike was skipped up to step 2, 3 in the run so far", "warn"),
        ("Spike", "2 NaNs or spikes were skipped up to step 4, 5 in the run so far", "warn"),
    ]
    assert said == [f"Spike: {text}" for _, text, _ in sent]


def test_one_title_is_said_once_in_ten_minutes(sent, said, clock):
    watch = alerts_for(sent)
    for step in range(1, 1201):
        watch.row({"step": step, "skipped": step})
        clock.now += 1
    watch.say("Training stopped", "too many", "error")
    spikes = [text for title, text, _ in sent if title == "Spike"]
    assert spikes == [
        "a NaN or a spike was skipped up to step 1, 1 in the run so far",
        "a NaN or a spike was skipped up to step 601, 601 in the run so far (599 more since it was said last)",
    ]
    assert sent[-1] == ("Training stopped", "too many", "error")
    assert len(said) == 3


@pytest.mark.parametrize(
    ("losses", "alert"),
    [
        ([3.0, 2.0, 2.5, 2.4, 2.6, 2.5], None),
        (
            [3.0, 2.0, 2.1, 2.2, 2.3, 2.4],
            ("Validation loss rises", "3 times in a row, to 2.3000 at step 4", "warn"),
        ),
        ([3.0, math.nan], ("Divergence", "the validation loss at step 1 is nan", "error")),
    ],
)
def test_validation_losses(sent, said, clock, losses, alert):
    watch = alerts_for(sent)
    for step, loss in enumerate(losses):
        watch.row({"step": step, "val_loss": loss})
        clock.now += alerts.AGAIN_S
    assert sent == ([alert] if alert else [])


def test_the_losses_of_other_text_are_not_compared(sent, said, clock):
    """The last validation is of more than those before it."""
    watch = alerts_for(sent)
    for step, (loss, tokens) in enumerate([(2.0, 10), (2.1, 10), (2.2, 10), (2.3, 50), (2.4, 50)]):
        watch.row({"step": step, "val_loss": loss, "val_tokens": tokens})
        clock.now += alerts.AGAIN_S
    assert sent == []


@pytest.mark.parametrize(
    ("usual", "slow", "alert"),
    [
        (0.5, 29.0, None),  # short
        (4.0, 39.0, None),  # less than ten steps
        (4.0, 41.0, "step 21 took 41 s; the steps before it took 4 s"),
        (0.5, 31.0, "step 21 took 31 s; the steps before it took 0.5 s"),
    ],
)
def test_a_step_that_stalled_is_said_when_it_ends(tmp_path, said, clock, usual, slow, alert):
    watch = Watch(tmp_path, config(), 0, enabled=True)
    clock.now += 300  # the first step compiles
    for step in range(1, 21):
        clock.now += usual
        watch.beat(step, "training")
    watch.beat(20, "validating")
    clock.now += 300
    watch.beat(20, "training")
    clock.now += slow
    watch.beat(21, "training")
    watch.close(0)
    assert said == ([f"Stall: {alert}"] if alert else [])


def test_rows_and_heartbeat(tmp_path):
    watch = Watch(tmp_path, config(), 0, enabled=True, attempt=3, world_size=4)
    assert (beat_of(tmp_path)["status"], beat_of(tmp_path)["step"]) == ("starting", 0)
    watch.log({"step": 1, "tokens": 1024, "loss": 5.5, "tokens_per_second": 900.0})
    watch.beat(1, "training")
    says = beat_of(tmp_path)
    assert (says["status"], says["loss"], says["tokens_per_second"]) == ("training", 5.5, 900.0)
    assert (says["tokens"], says["steps"], says["attempt"], says["world_size"]) == (1024, 100, 3, 4)
    watch.beat(1, "saving")
    assert beat_of(tmp_path)["status"] == "saving"
    watch.close(0)
    assert (beat_of(tmp_path)["status"], beat_of(tmp_path)["exit_code"]) == ("done", 0)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 5.5


@pytest.mark.parametrize(("code", "status"), [(0, "done"), (75, "continue"), (1, "failed"), (2, "stopped")])
def test_how_an_attempt_ended(tmp_path, code, status):
    Watch(tmp_path, config(), 0, enabled=True).close(code)
    assert beat_of(tmp_path)["status"] == status


def test_a_resumed_run_knows_what_was_skipped_before(tmp_path, said):
    watch = Watch(tmp_path, config(), 0, enabled=True)
    watch.log({"step": 1, "loss": 5.0, "skipped": 1})
    watch.log({"step": 2, "loss": 4.0, "skipped": 2})
    watch.close(75)
    del said[:]
    watch = Watch(tmp_path, config(), 1, enabled=True)
    watch.log({"step": 2, "loss": 4.0, "skipped": 1})
    watch.close(0)
    assert said == []
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_the_other_ranks_watch_nothing(tmp_path):
    watch = Watch(tmp_path, config(wandb="offline"), 0, enabled=False, plan={}, attempt=1, world_size=2)
    watch.log({"step": 1, "loss": 1.0})
    watch.beat(1, "training")
    watch.alert("Spike", "text")
    watch.close(0, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_config_plan_and_last_values_go_to_wandb(tmp_path, monkeypatch):
    made = []

    class Recorder:
        def __init__(self, folder, project, name, config, mode, logged):
            self.config, self.logged, self.calls = config, logged, []
            made.append(self)

        def log(self, row):
            self.calls.append(row)

        def alert(self, *alert):
            self.calls.append(alert)

        def begin_again(self, row):
            self.calls.append(("again", row["step"]))

        def finish(self, code, summary):
            self.calls.append((code, summary))

    monkeypatch.setattr("stepline.trainer.watch.watch.WandbLogger", Recorder)
    watch = Watch(tmp_path, config(), 0, enabled=True, plan={"steps": 100})
    watch.log({"step": 1, "tokens": 1024, "loss": 5.0})
    watch.log({"step": 1, "val_loss": 4.0, "expected_final_loss": 3.0})
    watch.alert("Checkpoint failed", "no space", "error")
    watch.close(75, {"train_seconds": 1.5})
    (first,) = made
    assert first.config["budget"]["batch_tokens"] == 1024
    assert first.config["plan"] == {"steps": 100}
    assert first.calls[2] == ("Checkpoint failed", "no space", "error")
    last = {"step": 1, "tokens": 1024, "loss": 5.0, "val_loss": 4.0, "expected_final_loss": 3.0}
    assert first.calls[3] == (75, last | {"train_seconds": 1.5, "status": "continue", "exit_code": 75})
    assert [row["step"] for row in first.logged(0)] == [1, 1]

    Watch(tmp_path, config(), 0, enabled=True).log({"step": 1, "loss": math.nan})
    watch = Watch(tmp_path, config(), 1, enabled=True)
    watch.log({"step": 2, "loss": 4.5})
    watch.close(0)
    _, _, again = made
    assert again.calls[-1] == (0, {"step": 2, "loss": 4.5, "status": "done", "exit_code": 0})

    (tmp_path / "plan.json").write_text('{"steps": 100, "lr": 0.5}')
    Watch(tmp_path, config(), 1, enabled=True)
    assert made[-1].config["plan"] == {"steps": 100, "lr": 0.5}


def test_rows_that_wait_are_tried_before_a_checkpoint(tmp_path, said, monkeypatch):
    """A kill after that checkpoint would lose them: the resumed run does not make their steps again."""
    folder, told = tmp_path / "run", []
    folder.mkdir()
    watch = Watch(folder, config(), 0, enabled=True)
    monkeypatch.setattr(watch.wandb, "disk_is_full", lambda: told.append("full"))
    monkeypatch.setattr(watch.wandb, "begin_again", lambda row: told.append(row["step"]))
    folder.rename(tmp_path / "away")
    folder.write_text("a file where the folder was")
    watch.log({"step": 1, "loss": 1.0})
    watch.log({"step": 2, "loss": 1.0})
    watch.beat(2, "saving")
    assert told == ["full"]
    folder.unlink()
    (tmp_path / "away").rename(folder)
    watch.beat(2, "saving")
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    assert told == ["full", 1]


def test_nothing_raises_where_the_folder_is_gone(tmp_path, said):
    folder = tmp_path / "run"
    folder.mkdir()
    watch = Watch(folder, config(), 0, enabled=True)
    (folder / "heartbeat.json").unlink()
    folder.rmdir()
    folder.write_text("a file where the folder was")
    watch.log({"step": 1, "loss": 1.0})
    watch.beat(1, "training")
    watch.beat(1, "saving")
    watch.close(0)
    assert len(said) == 3  # the rows wait, the heartbeat is not written, and at the end the rows are lost
