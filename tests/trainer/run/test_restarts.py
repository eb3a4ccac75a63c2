"""Whose ranks torchrun starts again after they were told to stop, or after a run that diverged."""

import pytest

from stepline.trainer.errors import FAILED, TO_BE_CONTINUED
from stepline.trainer.run.outcome import diverged_before, told_before, write_outcome


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
    for launcher, launch, restarts, told in (
        ("one:1:0", "a", 1, False),  # a node has come: all are started again, and no restart counts
        ("two:1:0", "a", 2, False),
        ("three:1:0", "a", 5, False),
        ("one:1:0", "a", 2, True),
        ("two:1:0", "a", 3, True),
        ("two:1:0", "b", 3, False),
    ):
        agent(launch, restarts)
        assert told_before(tmp_path, launcher) == told, (launcher, restarts)


def test_a_run_that_diverged_is_known_to_the_agent_that_started_it(agent, tmp_path):
    agent("none", 0)  # torchrun's name of a launch that was given none
    write_outcome(tmp_path, 1, FAILED, message="10 steps in a row", diverged=True, launched_by={"one:1:0": 0})
    agent("none", 1)
    assert diverged_before(tmp_path, "one:1:0") == "10 steps in a row"
    assert diverged_before(tmp_path, "one:2:0") is None
    agent("none", 0)
    assert diverged_before(tmp_path, "one:1:0") is None
