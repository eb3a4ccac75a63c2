"""What `stepline sweep` does by its options, what it prints as JSON, and what it refuses; no run is started."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stepline.trainer.errors import UserError
from stepline.trainer.run import sweep as module
from stepline.trainer.run.sweep import run_sweep
from stepline.trainer.run.sweep_local import LocalRunner
from stepline.trainer.run.sweep_runs import open_sweep, write_whole


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """Runs that were started, which are not."""
    names = []
    monkeypatch.setattr(LocalRunner, "_start", lambda self, run: names.append(run.name))
    return names


@pytest.fixture
def folder(request_of, tmp_path, capsys) -> Path:
    """A sweep that is laid out."""
    run_sweep(request_of(slurm=True, print_only=True), as_json=False)
    capsys.readouterr()
    return tmp_path / "sweep"


def test_more_ranks_than_gpus_are_refused(request_of, tmp_path, monkeypatch, started):
    monkeypatch.setattr(module, "find_gpus", lambda: {"0": "NVIDIA H200"})
    with pytest.raises(UserError, match=r"a run has 2 ranks \(--ranks\) and this machine 1 GPUs"):
        run_sweep(request_of(grid={"ranks": 2}), as_json=False)
    assert started == []
    assert not (tmp_path / "sweep").exists()


def test_slurm_starts_as_many_as_it_can(request_of, capsys):
    for jobs, told in ((None, "of all runs together, of which SLURM"), (2, "with 2 at a time")):
        assert run_sweep(request_of(slurm=True, dry_run=True, jobs=jobs, peak_flops=1e12), as_json=False) == 0
        assert told in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("as_json", [False, True])
def test_a_dry_run_of_one_run_starts_and_writes_nothing(request_of, tmp_path, capsys, started, as_json):
    assert run_sweep(request_of(only=1, dry_run=True, peak_flops=1e12), as_json) == 0
    out = capsys.readouterr().out
    assert (len(json.loads(out)["runs"]) == 1) if as_json else ("1 run to do" in out)
    assert not (tmp_path / "sweep").exists()
    assert started == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"only": 0, "collect": True}, "--only and --collect do not go together"),
        ({"only": 0, "slurm": True}, "--only and --slurm do not go together"),
        ({"collect": True, "slurm": True}, "--collect and --slurm do not go together"),
        ({"collect": True, "dry_run": True}, "--collect and --dry-run do not go together"),
        ({"slurm": True, "print_only": True, "dry_run": True}, "--print and --dry-run do not go together"),
        ({"print_only": True}, "--print needs --slurm"),
        ({"sbatch_options": "--time=1"}, "--sbatch needs --slurm"),
        ({"only": 4}, "--only is 4; the sweep has runs 0 to 3"),
        ({"output": Path("/proc/sw")}, "--output /proc/sw: cannot use /proc/sw: "),
        ({"overrides": ["run.device=cuda"]}, "run.device is cuda, but no GPU is found"),
        ({"overrides": ["run.device=cuda"], "only": 0}, "run.device is cuda, but no GPU is found"),
    ],
)
def test_mistakes(request_of, tmp_path, monkeypatch, started, options, sentence):
    monkeypatch.setattr(module, "find_gpus", dict)
    with pytest.raises(UserError) as caught:
        run_sweep(request_of(*options.pop("overrides", []), peak_flops=1e12, **options), as_json=False)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sweep").exists()
    assert started == []


def test_json_is_one_object(request_of, folder, capsys):
    assert run_sweep(request_of(slurm=True, print_only=True), as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["script"] == (folder / "sweep.sbatch").read_text()
    assert (told["elements"], told["job"]) == (4, None)
    run = open_sweep(folder).runs[2]
    (folder / "runs" / run.name).mkdir(parents=True)
    result = {"loss": 4.5, "diverged": False, "seconds": 1.0, "reason": ""}
    write_whole(folder / "runs" / run.name / "result.json", json.dumps(result))
    assert run_sweep(request_of(config=None, only=2), as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["run"], told["done"], told["result"], told["failed"]) == (run.name, True, result, None)


@pytest.mark.parametrize(
    ("key", "value"), [("params", "abc"), ("lr", None), ("shape", 3), ("flops", [1]), ("steps", {"a": 1})]
)
def test_a_damaged_layout_is_one_sentence(request_of, folder, key, value):
    content = json.loads((folder / "sweep.json").read_text())
    content["runs"][0][key] = value
    (folder / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        run_sweep(request_of(config=None), as_json=False)
    assert str(caught.value) == f"{folder / 'sweep.json'} is damaged; choose another --output"


def test_a_damaged_result_is_one_sentence(request_of, folder):
    run = open_sweep(folder).runs[0]
    (folder / "runs" / run.name).mkdir(parents=True)
    (folder / "runs" / run.name / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json is damaged; remove it"):
        run_sweep(request_of(config=None, collect=True), as_json=False)


def test_the_help_names_the_defaults():
    command = [sys.executable, "-m", "stepline.trainer", "sweep", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "0.25,0.5,1]" in told
    assert "x 0.5,1,2]" in " ".join(told.replace("│", " ").split())
