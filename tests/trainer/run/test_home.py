"""A run whose folder is given by `~`."""

import json
import shutil
from pathlib import Path

import yaml

from stepline.trainer.cli import app
from stepline.trainer.config_yaml import parse_overrides
from stepline.trainer.run.launch import run_training
from stepline.trainer.run.manifest import complete_checkpoints
from stepline.trainer.run.sweep import run_sweep
from stepline.trainer.run.sweep_local import LocalRunner
from stepline.trainer.run.sweep_runs import open_sweep


def test_it_trains_there_and_goes_on_there(tiny_config, tiny_data, tmp_path, monkeypatch, capsys):
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "data").symlink_to(tiny_data)
    options = ["run.folder=~/t", "data.path=~/data", "budget.steps=4", "checkpoint.every=2"]
    assert run_training(str(tiny_config), options, "never") == 0
    folder = tmp_path / "home" / "t"
    assert not (tmp_path / "~").exists()
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert (kept["run"]["folder"], kept["data"]["path"]) == (str(folder), str(tmp_path / "home" / "data"))
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    assert run_training(str(tiny_config), options, "auto") == 0
    assert f"continuing {folder / 'checkpoints' / 'step-000002'}" in capsys.readouterr().err
    assert [path.name for path in complete_checkpoints(folder)] == ["step-000002", "step-000004"]
    assert run_training(str(tiny_config), options, "auto") == 0
    assert f"{folder} is finished" in capsys.readouterr().err


def test_a_refused_config_is_noted_in_the_run_of_the_home_folder(tiny_config, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "t" / "logs" / "attempt-1").mkdir(parents=True)
    wrong = ["run.folder=~/t", "optimizer.lr=none"]
    assert CliRunner().invoke(app, ["train", str(tiny_config), *wrong]).exit_code == 1  # main() makes it 2
    outcome = json.loads((tmp_path / "home" / "t" / "outcome.json").read_text())
    assert "optimizer.lr is 'none'" in outcome["message"]


def test_a_sweep_in_a_folder_of_that_name_stays_there(request_of, tmp_path, monkeypatch):
    """As of `--output=~/sweep`, which no shell expands: its runs are where it looks for them."""
    here = tmp_path / "exp #3, a: b"  # YAML's signs are of the name
    here.mkdir()
    monkeypatch.chdir(here)
    run_sweep(request_of(output=Path("~/sweep"), slurm=True, print_only=True), as_json=False)
    runner = LocalRunner(open_sweep(Path("~/sweep")), jobs=1, threads=1, gpus=[], rate=None, say=print)
    first = runner.sweep.runs[0]
    said = parse_overrides([runner.command(first)[-1]])
    assert said == {"run.folder": str(here / "~" / "sweep" / "runs" / first.name)}
