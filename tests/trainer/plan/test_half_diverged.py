"""Cells without a point of which all seeds finished: no law stands on them, and nothing infinite is printed."""

import json
import math
import re

import numpy as np
import pytest

from stepline.trainer.errors import UserError
from stepline.trainer.plan.check import check_law
from stepline.trainer.plan.edges import cell_notes
from stepline.trainer.plan.fit import fit_law
from stepline.trainer.plan.laws import STEP_LAW
from stepline.trainer.plan.laws_command import run_check, run_fit
from stepline.trainer.plan.runs import read_runs

from .synthetic import NINE, sweep, write

WORDS = "no point where all seeds finished; add runs with lr below"


def half_diverged(cell, survivors=None):
    """The cell with a second seed that diverged at every point; survivors: points that a seed finished at all."""
    n, d, rows = cell
    other, first = rows.copy(), rows.copy()
    other[:, 2] = math.inf
    if survivors is not None:
        first[survivors:, 2] = math.inf
    return n, d, np.concatenate([first, other])


@pytest.mark.parametrize("cells", [1, 2])
def test_a_sweep_of_nothing_else_is_refused_in_one_sentence(tmp_path, cells):
    path = write(tmp_path / "runs.csv", [half_diverged(cell) for cell in sweep(NINE[:cells], points=4)])
    for command in (
        lambda: run_fit(str(path), tmp_path / "law.json", None, True),
        lambda: fit_law(read_runs(path), "x"),
    ):
        with pytest.raises(
            UserError, match=re.escape(f"{path} has no point where all seeds finished; lower the")
        ):
            command()
    with pytest.raises(
        UserError, match="no point where all seeds finished; there is no loss to compare with"
    ):
        run_check("step-law", str(path), True)
    assert not (tmp_path / "law.json").exists()


@pytest.mark.parametrize("survivors", [None, 1])
def test_such_a_cell_is_noted_and_the_law_is_that_of_the_others(tmp_path, survivors):
    good = sweep(NINE[:2], points=4)
    alone = fit_law(read_runs(write(tmp_path / "good.csv", good)), "mine")
    path = write(tmp_path / "runs.csv", [*good, half_diverged(sweep(NINE[2:3], points=4)[0], survivors)])
    table = read_runs(path)
    law = fit_law(table, "mine")
    assert (law.lr, law.batch_tokens, law.loss) == (alone.lr, alone.batch_tokens, alone.loss)
    assert (law.cells, law.runs, law.diverged) == (2, 64, 16 if survivors is None else 31)
    assert law.tokens == (1e8, 4.5e8)
    (note,) = cell_notes(table.cells[2])
    assert WORDS in note
    assert note in law.notes
    assert [check.tokens for check in check_law(STEP_LAW, table)] == [1e8, 4.5e8]


def test_what_check_prints_is_json(tmp_path, capsys):
    path = write(tmp_path / "runs.csv", [*sweep(NINE[:2]), half_diverged(sweep(NINE[2:3])[0], 1)])
    run_check("step-law", str(path), True)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    told = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert len(told["cells"]) == 2
    assert any(WORDS in note for note in told["notes"])
