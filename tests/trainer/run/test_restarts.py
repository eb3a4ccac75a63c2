"""Whose ranks torchrun starts again after they were told to stop, or after a run that diverged."""

import json
import os
import shutil
from pathlib import Path

import pytest

from stepline.trainer.errors import FAILED, TO_BE_CONTINUED
from stepline.trainer.run import launch
from stepline.trainer.run.manifest import SUPERSEDED, complete_checkpoints, step_of
from stepline.trainer.run.outcome import diverged_before, told_before, write_outcome
from stepline.trainer.run.signals import StopSignal
from stepline.trainer.watch.metrics import read_metrics


@pytest.fixture
def agent(monkeypatch):
    """Sets what torchrun's agent says of its launch."""

    def set_(launch: str, restarts: int) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))

    return set_


def test_each_agent_counts_for_itself(agent, tmp_path):
    """Rank 0's node came late and has counted one failure where another, told to stop too, has counted two."""
    agent("a", 1)
    write_outcome(tmp_path, 1, TO_BE_CONTINUED, told={"one:1:0": 1, "two:1:0": 2})
    for launcher, name, restarts, told in (
        ("one:1:0", "a", 1, False),  # a node has come: all are started again, and no restart counts
        ("two:1:0", "a", 2, False),
        ("three:1:0", "a", 5, False),
        ("one:1:0", "a", 2, True),
        ("two:1:0", "a", 3, True),
        ("two:1:0", "b", 3, False),
    ):
        agent(name, restarts)
        assert told_before(tmp_path, launcher) == told, (launcher, restarts)


def test_a_run_that_diverged_is_known_to_the_agent_that_started_it(agent, tmp_path):
    agent("none", 0)  # torchrun's name of a launch that was given none
    write_outcome(tmp_path, 1, FAILED, message="10 steps in a row", diverged=True, launched_by={"one:1:0": 0})
    agent("none", 1)
    assert diverged_before(tmp_path, "one:1:0") == "10 steps in a row"
    assert diverged_before(tmp_path, "one:2:0") is None
    agent("none", 0)
    assert diverged_before(tmp_path, "one:1:0") is None


def on_nodes(config: str, options: list[str], resume: str, agents: list[str]) -> tuple[int, list]:
    """One rank on each of two nodes of an elastic launch; what all of them must agree on beside the exit code."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "elastic"}
    stop, jobs, run = StopSignal(), [], launch._run
    stop.launcher = agents[int(os.environ["RANK"])]
    launch._run = lambda job, *more: jobs.append(job) or run(job, *more)
    try:
        code = launch.run_training(config, options, resume, stop)
    finally:
        launch._run = run
    return code, [(j.resume_from and j.resume_from.name, j.resume_chosen, j.again, j.launchers) for j in jobs]


@pytest.fixture
def nodes(pool, tiny_config, tmp_path):
    def start(resume: str, *agents: str, steps: int = 6, more: tuple = ()) -> list:
        options = [f"run.folder={tmp_path / 'run'}", f"budget.steps={steps}", "checkpoint.every=2", *more]
        return pool.run(2, on_nodes, str(tiny_config), options, resume, list(agents), init=False)

    return start


def message(run: Path) -> str:
    return json.loads((run / "outcome.json").read_text())["message"]


def test_a_node_that_comes_joins_a_launch_that_has_moved_on(nodes, train, tiny_config, tmp_path):
    """What its command names, or begins from, may be gone by then."""
    run, first = tmp_path / "run", tmp_path / "first"
    train(1, tiny_config, first, "budget.steps=1")
    begin = ("run.init_from=" + str(first),)
    assert nodes("never", "a", "b", more=begin) == [(0, [(None, False, False, ["a", "b"])])] * 2
    shutil.rmtree(first)
    shutil.rmtree(run / "checkpoints/step-000006")
    went_on = [(0, [("step-000004", False, True, ["a", "c"])])] * 2
    assert nodes("never", "a", "c", more=begin) == went_on

    for name in ("step-000002", "step-000006"):
        shutil.rmtree(run / "checkpoints" / name)
    assert nodes("step-000002", "d", "a") == [(0, [("step-000004", False, True, ["a", "d"])])] * 2
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row] == list(range(1, 7))


def test_a_launch_on_nodes_begins_where_it_is_told(nodes, tmp_path):
    run = tmp_path / "run"
    assert [code for code, _ in nodes("never", "a", "b")] == [0, 0]
    assert nodes("never", "c", "d") == [(2, [])] * 2
    sentence = f"{run} holds a run already; choose another run.folder or resume it (--resume auto)"
    assert json.loads((run / "outcome.json").read_text())["status"] == "done"
    shutil.rmtree(run / "checkpoints/step-000006")
    (run / "outcome.json").unlink()
    assert nodes("never", "c", "d") == [(2, [])] * 2
    assert message(run) == sentence
    assert nodes("step-000003", "c", "d") == [(2, [])] * 2
    assert message(run) == f"step-000003 is no complete checkpoint of {run}; it has step-000002, step-000004"
    assert nodes("step-000002", "c", "d") == [(0, [("step-000002", True, False, ["c", "d"])])] * 2
    assert [step_of(path) for path in complete_checkpoints(run)] == [2, 4, 6]
    assert not list(run.glob(f"checkpoints/*/{SUPERSEDED}")), "the one that was given up is saved again"
