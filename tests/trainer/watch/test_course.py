"""A run that goes back and on with another budget, and what wandb holds of it."""

import json

import pytest

from stepline.trainer.config import Config
from stepline.trainer.config_io import write_config
from stepline.trainer.watch.course import leave_course
from stepline.trainer.watch.loggers import run_id

MODEL = {"vocab_size": 16, "hidden_size": 8, "num_layers": 1, "num_heads": 1, "ffn_size": 8}


def config(steps: int) -> Config:
    """Of 20 steps, wsd decays from the 18th on; of 30 from the 26th."""
    schedule = {"name": "wsd", "warmup_steps": 2}
    budget = {"steps": steps, "batch_tokens": 100}
    return Config.model_validate({"model": MODEL, "budget": budget, "schedule": schedule})


@pytest.mark.parametrize(
    ("sent", "step", "steps", "left"),
    [
        (20, 12, 30, True),
        (18, 12, 30, True),
        (17, 12, 30, False),  # none of its rows has decayed
        (20, 12, 20, False),
        (20, 20, 30, False),  # refused elsewhere; nothing is behind it
        (15, 12, 14, True),
        (None, 12, 30, False),
    ],
)
def test_rows_of_a_course_that_is_left_stay_with_the_old_run_of_wandb(
    tmp_path, said, sent, step, steps, left
):
    write_config(config(20), {}, tmp_path / "config.yaml")
    before, file = run_id(tmp_path), tmp_path / "wandb-sent.json"
    if sent is not None:
        rows = {"step": sent, "validation": False, "mode": "online", "rows": sent, "latest": []}
        file.write_text(json.dumps(rows))
    leave_course(tmp_path, config(steps), step)
    now = run_id(tmp_path)
    assert (now != before, file.exists()) == (left, sent is not None and not left)
    sentence = (
        f"wandb's run {before} keeps its rows up to step {sent}, of a course that was left at step {step}; this one "
        f"goes on as its run {now}, with all rows"
    )
    assert said == [sentence] * left
