"""A sweep's runs on this machine: crashes, hangs, divergence, locks and GPUs; their trainings are short programs, but
for one test."""

import csv
import sys
import textwrap

import pytest

from stepline.trainer.errors import UserError
from stepline.trainer.plan.sweep_cost import Rate, run_seconds
from stepline.trainer.run.launch import run_training
from stepline.trainer.run.sweep import run_sweep, threads_of_a_rank
from stepline.trainer.run.sweep_local import LocalRunner, Report
from stepline.trainer.run.sweep_runs import locked, open_sweep
from stepline.trainer.run.sweep_slurm import array_of, render


class Fake(LocalRunner):
    """Runs a short program instead of a training."""

    program = ""

    def command(self, run):
        folder = self.sweep.folder(run)
        return [sys.executable, "-c", f"folder, lr = {str(folder)!r}, {run.lr}\n{self.program}"]


@pytest.fixture
def runner(request_of, tmp_path, capsys):
    """A runner over the sweep of `request_of`, its program to be set."""
    run_sweep(request_of(slurm=True, print_only=True), as_json=False)
    said = []
    made = Fake(open_sweep(tmp_path / "sweep"), jobs=2, threads=1, gpus=[], rate=None, say=said.append)
    made.said = said
    return made


DONE = """
import json
open(folder + "/metrics.jsonl", "w").write('{"step": 1, "loss": 6.0}')
open(folder + "/outcome.json", "w").write(json.dumps({"status": "done", "val_loss": 5.0, "train_seconds": 1.0}))
"""


def test_a_crash_is_told_and_the_others_are_done(runner):
    runner.program = 'assert lr < 2e-3, "boom"\n' + DONE
    report = runner.do(runner.sweep.missing())
    assert (report.done, report.diverged) == (2, 0)
    assert sorted(reason for _, reason in report.failed) == ["AssertionError: boom"] * 2
    assert len(runner.sweep.missing()) == 2
    runner.program = DONE
    assert runner.do(runner.sweep.missing()).done == 4  # the report goes on
    assert len((runner.sweep.path / "runs.csv").read_text().splitlines()) == 5


HUNG = """
import json
hung = {"status": "failed", "exit_code": 1, "attempt": 1, "message": "rank 0: no progress for 600 s"}
open(folder + "/outcome.json", "w").write(json.dumps(hung))
raise SystemExit(1)
"""


def test_a_run_that_the_watchdog_has_ended_is_told_and_done_again(runner, request_of, capsys):
    runner.program = DONE + "if lr > 1.5e-3:\n" + textwrap.indent(HUNG, "    ")
    report = runner.do(runner.sweep.missing())
    assert report.done == 2
    assert [reason for _, reason in report.failed] == ["rank 0: no progress for 600 s"] * 2
    assert run_sweep(request_of(config=None, collect=True), as_json=True) == 0
    assert len(runner.sweep.missing()) == 2
    runner.program = DONE
    runner.do(runner.sweep.missing())
    assert not runner.sweep.missing()


class Pooled(LocalRunner):
    """Does a run in the pool, before the process starts that stands for it."""

    def command(self, run):
        self.train([str(self.sweep.config), *run.overrides(), f"run.folder={self.sweep.folder(run)}"])
        return [sys.executable, "-c", ""]


def trained(words: list[str]) -> int:
    return run_training(words[0], words[1:], "never")


def test_a_run_that_the_guard_stops_is_data(request_of, tmp_path, capsys, pool):
    skips = ["model.z_loss=1e38", "optimizer.guard.max_skipped=3"]
    run_sweep(request_of(*skips, slurm=True, print_only=True, grid={"sizes": (0.5,)}), as_json=False)
    runner = Pooled(open_sweep(tmp_path / "sweep"), jobs=1, threads=1, gpus=[], rate=None, say=print)
    runner.train = lambda words: pool.run(1, trained, words, init=False)
    report = runner.do(runner.sweep.missing())
    assert (report.done, report.diverged, report.failed) == (2, 2, [])
    assert not runner.sweep.missing()
    rows = list(csv.DictReader((tmp_path / "sweep" / "runs.csv").read_text().splitlines()))
    assert [(row["loss"], row["diverged"]) for row in rows] == [("", "1")] * 2
    assert float(rows[0]["seconds"]) > 0
    assert "diverged: 3 steps in a row had a NaN or a spike" in capsys.readouterr().out


def test_the_time_left_is_not_corrected_by_a_part_of_a_run(runner):
    """A run that goes on from a checkpoint, and one that diverged, have not made all their steps in this call."""
    runner.jobs, runner.rate = 1, Rate(1e9, "")
    first, second, third, fourth = runner.sweep.runs
    checkpoint = runner.sweep.folder(first) / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").touch()
    diverges = DONE.replace('"val_loss": 5.0', '"val_loss": 7.0')
    runner.program = f"if folder.endswith({second.name!r}):\n{textwrap.indent(diverges, '    ')}else:\n"
    runner.program += textwrap.indent(DONE, "    ")
    runner.do([first, second])
    assert (runner.report.done, runner.report.diverged) == (2, 1)
    assert runner.estimated == runner.taken == 0
    assert all(text.endswith(" min left") for text in runner.said)
    runner.do([third, fourth])
    assert runner.estimated == pytest.approx(sum(run_seconds(run, 1e9) for run in (third, fourth)))
    assert runner.taken > 0


def test_a_sweep_that_only_fails_ends_early(runner):
    runner.program = 'raise SystemExit("no such thing")'
    report = runner.do(runner.sweep.missing())
    assert 3 <= len(report.failed) <= 4
    assert report.failed[0][1] == "no such thing"


def test_runs_that_always_fail_do_not_hold_up_the_others(runner, request_of, tmp_path):
    """Neither in a sweep that has results, nor where the first ones of all fail."""
    first = runner.sweep.runs[0]
    runner.program = DONE
    runner.jobs = 1
    runner.do([runner.sweep.runs[-1]])
    runner.report = Report()
    runner.program = f'assert lr != {first.lr}, "boom"\n' + DONE
    runner.do(runner.sweep.missing())
    assert {run.lr for run in runner.sweep.missing()} == {first.lr}

    run_sweep(
        request_of(
            slurm=True,
            print_only=True,
            output=tmp_path / "other",
            grid={"lr": tuple(i * 1e-3 for i in range(1, 7))},
        ),
        as_json=False,
    )
    other = Fake(open_sweep(tmp_path / "other"), jobs=1, threads=1, gpus=[], rate=None, say=lambda text: None)
    bad = {run.name for run in other.sweep.runs[:3]}
    other.program = f'import os\nassert os.path.basename(folder) not in {bad}, "boom"\n' + DONE
    assert len(other.do(other.sweep.missing()).failed) == 3
    other.report = Report()
    other.do(other.sweep.missing())
    assert {run.name for run in other.sweep.missing()} == bad


def test_a_run_that_another_process_works_on_is_left_alone(runner):
    runner.program = DONE
    theirs = runner.sweep.runs[0]
    with locked(runner.sweep.lock(theirs), wait=False) as mine:
        assert mine is not None
        report = runner.do(runner.sweep.missing())
    assert report.elsewhere == [theirs]
    assert runner.sweep.missing() == [theirs]


def test_gpus_are_dealt_out_and_a_launcher_is_not_passed_on(runner, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    runner.gpus = ["2", "3", "5"]
    assert [runner._environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["2", "3", "5", "2"]
    assert "MASTER_ADDR" not in runner._environment(0)
    assert runner._environment(0)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert [threads_of_a_rank(ranks) for ranks in (1, 2, 16)] == [8, 4, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_of_a_rank(1) == 3


def test_array_of_the_missing_runs(runner):
    assert array_of([0, 1, 2, 5, 7, 8], None) == "0-2,5,7-8"
    assert array_of([3], 4) == "3%4"
    with pytest.raises(UserError, match="write options as --name=value"):
        render(runner.sweep, runner.sweep.runs, None, "-p gpu")
