"""outcome.json: what it says of an attempt, and of a start that was refused."""

import json

from stepline.trainer.run.outcome import read_outcome, write_outcome


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
