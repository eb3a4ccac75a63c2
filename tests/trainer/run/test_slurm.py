"""What `stepline submit` writes, and when a job is requeued; real jobs are in tests/e2e/slurm."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from stepline.trainer.errors import UserError
from stepline.trainer.run.requeue import decide
from stepline.trainer.run.slurm import directive, option_lines, seconds_of
from stepline.trainer.run.submit import Request, check_numbers, layout_of, render, run_submit

DONE = {"status": "done", "exit_code": 0}
CONTINUE = {"status": "continue", "exit_code": 75, "message": "SIGUSR1: step 9 is saved"}
MISTAKE = {"status": "stopped", "exit_code": 2, "message": "no data"}
DIVERGED = {"status": "failed", "exit_code": 1, "diverged": True, "message": "10 steps in a row had a NaN"}
FAILED = {"status": "failed", "exit_code": 1, "message": "rank 1: RuntimeError"}


@pytest.mark.parametrize(
    ("code", "outcome", "further", "preempted", "expected"),
    [
        (0, DONE, True, False, (0, False)),
        (1, CONTINUE, True, False, (75, True)),
        (1, CONTINUE, False, True, (75, True)),
        (1, CONTINUE, False, False, (1, False)),  # it would go on for ever
        (1, MISTAKE, False, False, (2, False)),
        (1, FAILED, True, False, (75, True)),
        (1, DIVERGED, True, False, (75, True)),  # perhaps a faulty device's doing
        (1, DIVERGED, False, False, (1, False)),
        (1, DIVERGED, False, True, (1, False)),  # as would every later attempt
        (1, FAILED, False, False, (1, False)),
        (137, {}, False, True, (75, True)),
        (137, {}, False, False, (137, False)),
    ],
)
def test_what_becomes_of_a_job(code, outcome, further, preempted, expected):
    verdict = decide(code, outcome, further, preempted)
    assert (verdict.exit_code, verdict.requeue) == expected
    assert verdict.why


SCONTROL = """#!/bin/sh
case "$*" in
    *show*) echo "JobId=7 JobState=RUNNING PreemptTime=None" ;;
    requeue*) echo "$*" > "$(dirname "$0")/asked"; kill -TERM $PPID ;;
esac
"""
SAVES = """
mkdir -p run/checkpoints/step-000009 && touch run/checkpoints/step-000009/COMPLETE
echo '{"status": "continue", "exit_code": 75, "attempt": 1, "message": "SIGUSR1: step 9 is saved",
    "launcher": {"run_id": "7-1", "restarts": 0}}' > run/outcome.json
exit 1
"""


@pytest.mark.parametrize("log", ["job.log", "/dev/full"])
def test_a_job_log_that_takes_no_line_loses_no_job(tmp_path, log):
    """SLURM ends the script as soon as the job is requeued."""
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    command = [sys.executable, "-m", "stepline.trainer.run.requeue", "--run", "run", "--attempt", "7-1"]
    with open(tmp_path / log, "w") as out:
        done = subprocess.run(
            [*command, "--log", "attempt.log", "--", "sh", "-c", SAVES],
            cwd=tmp_path,
            env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (75, "")
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    if log == "job.log":
        said = [line[20:] for line in (tmp_path / log).read_text().splitlines()]
        assert said == ["SIGUSR1: step 9 is saved", "job 7 is requeued"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("UNLIMITED", None),
    ],
)
def test_time_limits(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1h", "-5", "1:2:3:4", "0"])
def test_time_limits_that_are_none(text):
    with pytest.raises(UserError, match="--time is"):
        seconds_of(text)


def test_options_for_sbatch():
    assert option_lines("--partition=gpu --exclusive --comment='a b'") == (
        '#SBATCH --partition=gpu\n#SBATCH --exclusive\n#SBATCH --comment="a b"'
    )
    for wrong in ("-p gpu", "gpu", "--comment='a"):
        with pytest.raises(UserError, match="--sbatch"):
            option_lines(wrong)
    with pytest.raises(UserError, match="line break"):
        directive("a\nb")


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        ({"nodes": 0}, "--nodes is 0"),
        ({"gpus_per_node": -1}, "--gpus-per-node is -1"),
        ({"lead": 5}, "--lead is 5; it must be at least 10"),
        ({"time": "5"}, "leaves no time"),
    ],
)
def test_numbers_that_no_job_can_have(ask, sentence):
    with pytest.raises(UserError, match=sentence):
        check_numbers(Request("quickstart", [], **ask))


def test_the_script(tmp_path):
    """Valid bash, nothing left to fill in, two nodes of eight GPUs."""
    ask = Request("dense-1b", ["data.path=my data"], nodes=2, sbatch_options="--partition=gpu")
    script = render(ask, layout_of(ask, "auto"), tmp_path / "a run")
    for line in ("--nodes=2", "--gpus-per-node=8", "--signal=USR1@300", "--requeue", "--partition=gpu"):
        assert f"#SBATCH {line}\n" in script
    assert (
        "train dense-1b 'data.path=my data' run.device=cuda\n" in script
    )  # no node may take its CPU instead
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("resume", "command"),
    [("auto", ""), ("never", ""), ("step-000002", " --resume step-000002"), ("a b", " --resume 'a b'")],
)
def test_a_checkpoint_to_go_on_from_stands_in_the_script(tmp_path, resume, command):
    """Not `never`, with which a requeued job would refuse its own run: that is checked when the job is handed in."""
    ask = Request("dense-1b", [], resume=resume)
    assert f"train dense-1b run.device=cuda{command}\n" in render(ask, layout_of(ask, "auto"), tmp_path)
    ask = replace(ask, ranks_per_node=2)
    assert f"train dense-1b{command}\n" in render(ask, layout_of(ask, "auto"), tmp_path)


def test_what_cannot_be_resumed_is_not_handed_in(train, tiny_config, tmp_path, capsys):
    few = ["budget.steps=4", "checkpoint.every=2"]
    train(1, tiny_config, tmp_path / "run", *few)
    ask = Request(
        str(tiny_config), [f"run.folder={tmp_path / 'run'}", *few], ranks_per_node=1, print_only=True
    )
    for resume, sentence in (
        ("never", "holds a run already"),
        ("step-000003", "is no complete checkpoint of .*; it has step-000002, step-000004"),
    ):
        with pytest.raises(UserError, match=sentence):
            run_submit(replace(ask, resume=resume), as_json=False)
    run_submit(replace(ask, resume="step-000002"), as_json=False)
    assert "--resume step-000002\n" in capsys.readouterr().out
