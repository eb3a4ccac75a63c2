"""Which budgets a resume may ask for, and the sentence for each that it may not."""

import pytest

from stepline.trainer.config import Config
from stepline.trainer.config_io import dump, format_config
from stepline.trainer.config_resume import merge_for_resume
from stepline.trainer.errors import UserError

MODEL = {"vocab_size": 100, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_size": 128}


def config(schedule: str = "wsd", sparse: dict | None = None, **budget) -> Config:
    """A resolved one: with 20 steps of 100 tokens, 2 of them warm-up, wsd decays from the 18th step on."""
    return Config.model_validate(
        {
            "model": MODEL,
            "budget": {"batch_tokens": 100} | budget,
            "schedule": {"name": schedule, "warmup_steps": 2},
            "sparse": sparse or {},
            "run": {"folder": "runs/a"},
        }
    )


def resumed(step: int, asked: dict, **saved) -> tuple[Config, dict]:
    budget = dict.fromkeys(("budget.tokens", "budget.steps"), "override")
    common = {key: saved[key] for key in ("schedule", "sparse") if key in saved}
    return merge_for_resume(config(**{"steps": 20} | saved), config(**asked, **common), budget, step)


@pytest.mark.parametrize(
    ("step", "asked", "steps"),
    [
        (10, {"steps": 30}, 30),
        (17, {"steps": 30}, 30),  # the 17th is the last at the peak
        (10, {"tokens": 2950}, 30),  # another key than at the start
        (10, {"steps": 12}, 12),  # decays from the 12th on
        (0, {"steps": 1}, 1),
        (20, {"tokens": 1960}, 20),  # the same steps
        (20, {}, 20),  # a config without a budget
    ],
)
def test_budgets_that_leave_what_is_done_as_it_is(step, asked, steps):
    merged, origins = resumed(step, asked)
    assert merged.total_steps() == steps
    assert dump(merged)["budget"] == {"tokens": None, "steps": None, "batch_tokens": 100, "law": None} | (
        asked or {"steps": 20}
    )
    assert origins["budget.steps"] == ("override" if asked else "saved run")


FROM_TO = "the budget was budget.steps=20 in runs/a and is now budget.{}"


@pytest.mark.parametrize(
    ("step", "asked", "sentence"),
    [
        (
            18,
            {"steps": 30},
            "; the learning rate has decayed since step 18 and the checkpoint is of step 18: give the old value back, "
            "or go on from a checkpoint of step 17 or before (`--resume PATH`, once)",
        ),
        (
            20,
            {"tokens": 3000},
            "; the learning rate has decayed since step 18 and the checkpoint is of step 20: give the old value back, "
            "or go on from a checkpoint of step 17 or before (`--resume PATH`, once)",
        ),
        (10, {"steps": 10}, ", which ends at step 10, and the checkpoint is of step 10: give more than that"),
        (
            12,
            {"steps": 13},  # round(.2 * 13) = 3
            ", with which the learning rate has decayed since step 12, and the checkpoint is of step 12: give a larger "
            "budget",
        ),
    ],
)
def test_budgets_that_would_have_changed_what_is_done(step, asked, sentence):
    ((key, value),) = asked.items()
    with pytest.raises(UserError) as caught:
        resumed(step, asked)
    assert str(caught.value) == FROM_TO.format(f"{key}={value}") + sentence


def test_steps_that_were_dense():
    dense = {"mode": "s-ste", "dense_fraction": 0.5}
    assert resumed(10, {"steps": 30}, sparse=dense)[0].total_steps() == 30
    with pytest.raises(UserError) as caught:
        resumed(11, {"steps": 30}, sparse=dense)
    assert str(caught.value) == FROM_TO.format("steps=30") + (
        "; steps have been dense (sparse.dense_fraction) since step 11 and the checkpoint is of step 11: give the old "
        "value back, or go on from a checkpoint of step 10 or before (`--resume PATH`, once)"
    )


def test_a_finished_run_whose_decay_rounds_to_no_step():
    with pytest.raises(UserError) as caught:
        resumed(2, {"steps": 9}, steps=2)
    assert str(caught.value) == (
        "the budget was budget.steps=2 in runs/a and is now budget.steps=9; its last step is done: give the old value "
        "back, or go on from an earlier checkpoint (`--resume PATH`, once)"
    )


def test_an_imported_run_has_no_budget_to_change():
    with pytest.raises(UserError) as caught:
        resumed(0, {"steps": 9}, steps=None)
    assert str(caught.value) == (
        "runs/a is an imported run: start another run.folder with run.init_from=runs/a"
    )


def test_a_budget_that_only_the_file_gives():
    """Whoever forgets an option of the start must not get the file's D."""
    with pytest.raises(UserError) as caught:
        merge_for_resume(config(steps=20), config(steps=30), {"budget.steps": "my.yaml"}, 10)
    assert str(caught.value) == (
        "budget.steps was 20 in runs/a and is now 30: give the old value back, or the new one on the command line"
    )


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_other_schedules(name):
    assert resumed(1, {"steps": 20}, schedule=name)[0].total_steps() == 20
    with pytest.raises(UserError) as caught:
        resumed(1, {"steps": 30}, schedule=name)
    assert str(caught.value) == FROM_TO.format("steps=30") + (
        f"; with schedule.name={name} it cannot change on resume (with wsd it may, before the decay): give the old "
        "value back or choose a new run.folder"
    )


def test_config_yaml_lists_the_budget_where_it_may_change():
    lists = [format_config(config(name, steps=20), {}).splitlines()[1] for name in ("wsd", "linear")]
    assert lists[0] == f"{lists[1][:-1]}; before the decay budget.tokens or budget.steps."


def test_the_split_of_validations_stays():
    """A forgotten `logging.eval_split=tune` would put the losses of two texts on one curve."""
    saved, asked = config(steps=20), config(steps=20)
    saved.logging.eval_split = "tune"
    forgotten = {"logging.eval_split": "default"}
    assert merge_for_resume(saved, asked, forgotten, 10)[0].logging.eval_split == "tune"
    with pytest.raises(
        UserError, match=r"^logging.eval_split was 'tune' in runs/a and is now 'val'; it cannot"
    ):
        merge_for_resume(saved, asked, {"logging.eval_split": "my.yaml"}, 10)
