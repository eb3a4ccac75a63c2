"""outcome.json: what it says of an attempt, and of a start that was refused."""

import json
import sys

import pytest

from stepline.trainer import cli
from stepline.trainer.errors import UserError
from stepline.trainer.files import locked
from stepline.trainer.run.lock import LOCK
from stepline.trainer.run.outcome import read_outcome, write_outcome
from stepline.trainer.run.refusal import note_refusal
from stepline.trainer.run.requeue import outcome_of
from stepline.trainer.run.signals import StopSignal


def refuse(constant: str) -> None:
    raise ValueError(constant)


def test_a_loss_that_is_not_finite_is_valid_json(tmp_path):
    write_outcome(tmp_path, 3, 0, val_loss=float("nan"), seconds=1.5)
    text = (tmp_path / "outcome.json").read_text()
    assert json.loads(text, parse_constant=refuse) == {
        "status": "done",
        "exit_code": 0,
        "attempt": 3,
        "val_loss": None,
        "val_loss_is_finite": False,
        "seconds": 1.5,
        "launcher": None,
    }
    write_outcome(tmp_path, 3, 1, message="a later word of the same attempt")
    assert read_outcome(tmp_path)["status"] == "done"


SAVED = {
    "status": "continue",
    "exit_code": 75,
    "attempt": 1,
    "message": "SIGTERM: step 9 is saved",
    "told": {"here:1:0": 0},
    "launcher": {"run_id": "job", "restarts": 0},
}
BEAT = {"time": 5.0, "status": "continue", "step": 9, "eta_s": 3.0, "attempt": 1, "exit_code": 75}


@pytest.fixture
def run(tmp_path):
    """A run that has been told to stop, and has saved."""
    folder = tmp_path / "run"
    (folder / "logs" / "attempt-1").mkdir(parents=True)
    (folder / "outcome.json").write_text(json.dumps(SAVED))
    (folder / "heartbeat.json").write_text(json.dumps(BEAT))
    return folder


def beat_of(folder):
    return json.loads((folder / "heartbeat.json").read_text())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["data.path=/nowhere"], "/nowhere is no prepared data folder"),
        (["data.path=/nowhere", "modle.z_loss=1"], "modle"),
        (["data.path"], "'data.path' is not an override"),
    ],
)
def test_a_refused_start_says_so_in_the_runs_folder(run, options, sentence, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["stepline", "train", "quickstart", f"run.folder={run}", *options])
    monkeypatch.setattr(cli.os, "_exit", sys.exit)
    monkeypatch.setattr(StopSignal, "install", StopSignal)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    message = capsys.readouterr().err.removeprefix("error: ").rstrip("\n")
    assert ended.value.code == 2
    assert sentence in message
    assert read_outcome(run) == {
        "status": "stopped",
        "exit_code": 2,
        "attempt": None,
        "message": message,
        "launcher": None,
    }
    says = beat_of(run)
    assert says["time"] > 5
    new = {"time": says["time"], "time_iso": says["time_iso"], "stale_after_s": None}
    assert says == BEAT | new | {"status": "stopped", "eta_s": None, "exit_code": 2}
    assert outcome_of(run, "job") == {}


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("run: {{folder: {run}}}\nbudgt: 3\n", None),
        ("base: other\nmodel: {{layers: 3}}\n", "run:\n  folder: {run}\n"),
        ("base: other\nrun: {{sed: 1}}\n", "base: mine\nrun: {{folder: {run}}}\n"),
        ("model: [\nrun:\n  folder: '{run}'  # here\n", None),
        ("model: [\n", None),
        ("budgt: 3\n", None),
    ],
)
def test_a_mistake_in_the_config_file_is_noted_where_it_says(run, tmp_path, monkeypatch, text, base):
    monkeypatch.chdir(tmp_path)
    if "{run}" not in text + (base or ""):
        (tmp_path / "runs").mkdir()
        run = run.rename(tmp_path / "runs" / "mine")
    for name, content in (("mine", text), ("other", base)):
        (tmp_path / f"{name}.yaml").write_text((content or "").format(run=run))
    note_refusal("mine.yaml", [], UserError("mend the file"))
    assert (read_outcome(run)["status"], read_outcome(run)["message"]) == ("stopped", "mend the file")
    assert beat_of(run)["status"] == "stopped"


def refuse_start(folder):
    note_refusal("quickstart", [f"run.folder={folder}"], UserError("choose another"))


def test_a_run_that_trains_in_another_process_is_left_alone(run):
    with locked(run / LOCK, wait=False):
        refuse_start(run)
    assert (read_outcome(run), beat_of(run)) == (SAVED, BEAT)
    refuse_start(run)
    assert read_outcome(run)["message"] == "choose another"


def test_a_run_that_is_done_stays_done(run):
    (run / "outcome.json").write_text('{"status": "done", "attempt": 1, "val_loss": 2.5}')
    (run / "heartbeat.json").write_text('{"status": "done"}')
    refuse_start(run)
    assert read_outcome(run) == {"status": "done", "attempt": 1, "val_loss": 2.5}
    assert beat_of(run) == {"status": "done"}


def test_what_a_launch_has_said_stays_when_it_starts_its_ranks_again(run, monkeypatch):
    """Told to stop they stay stopped, whatever the next ones find."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    refuse_start(run)
    assert read_outcome(run) == SAVED
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a later job")
    refuse_start(run)
    assert read_outcome(run)["launcher"] == {"run_id": "a later job", "restarts": 1}
    assert outcome_of(run, "a later job") == {}, "what a requeued job is told stands in its log"


def test_a_mistake_makes_no_folder_and_no_run(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        refuse_start(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
