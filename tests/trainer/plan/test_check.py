"""Regret: the interpolation against scipy, its gaps and edges, and `stepline laws check` as a user calls it."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from stepline.trainer.plan.check import check_law, on_grid, on_parabola
from stepline.trainer.plan.law_file import find_law
from stepline.trainer.plan.laws import STEP_LAW
from stepline.trainer.plan.runs import Cell, Run, RunTable, read_runs

from .synthetic import NINE, STEP, sweep, write

RATES, BATCHES = [1e-3, 2e-3, 4e-3, 8e-3], [1e4, 2e4, 4e4]


def cell_of(losses):
    """Losses [4, 3] on the grid."""
    runs = [Run(1e7, 1e9, lr, b, losses[i][j]) for i, lr in enumerate(RATES) for j, b in enumerate(BATCHES)]
    return Cell(1e7, 1e9, tuple(runs))


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 8e-3), st.floats(1e4, 4e4))
@example(0, 0.0078125, 20001.0)  # just beyond a value of the grid
@settings(max_examples=60, deadline=None)
def test_inside_the_grid_it_is_bilinear_in_the_logarithms(seed, lr, batch):
    losses = 3 + np.random.default_rng(seed).random((4, 3))
    theirs = RegularGridInterpolator(
        (np.log(RATES), np.log(BATCHES)), losses, bounds_error=False, fill_value=None
    )
    ours = on_grid(cell_of(losses.tolist()), lr, batch)
    assert ours == pytest.approx(float(theirs([[math.log(lr), math.log(batch)]])[0]), rel=1e-12)


def test_a_missing_run_widens_the_rectangle():
    losses = np.array([[3.0, 3.0, 3.0], [3.1, 3.1, 3.1], [3.2, math.inf, 3.2], [3.3, 3.3, 3.3]])
    assert on_grid(cell_of(losses.tolist()), 3e-3, 1.5e4) == pytest.approx(3.1 + 0.1 * math.log2(1.5))
    losses[:, 1] = math.inf
    assert on_grid(cell_of(losses.tolist()), 3e-3, 1.5e4) == pytest.approx(3.1 + 0.1 * math.log2(1.5))
    losses[2:] = math.inf
    assert on_grid(cell_of(losses.tolist()), 3e-3, 1.5e4) is None


def test_outside_the_grid_it_is_the_cells_parabola():
    ((n, d, rows),) = sweep([(5e6, 1e8)])
    cell = Cell(n, d, tuple(Run(n, d, *row) for row in rows.tolist()))
    lr, batch = STEP_LAW.lr(n, d), STEP_LAW.batch_tokens(d)
    best = 1.5 + 300 / n**0.3478 + 1500 / d**0.3658
    assert on_parabola(cell, lr, batch) == pytest.approx(best, rel=1e-6)
    far = math.exp(1.0)
    assert on_grid(cell, lr * far, batch) is None
    assert on_parabola(cell, lr * far, batch) == pytest.approx(best * (1 + 0.0106 / 2), rel=1e-6)
    assert on_parabola(Cell(n, d, cell.runs[:5]), lr, batch) is None


def test_regret_is_what_the_law_costs(tmp_path):
    """A law at the optimum costs what the grid misses it by; one that is off by 2 in lr, h11/2 ln(2)^2 more."""
    table = read_runs(
        write(tmp_path / "runs.csv", sweep(NINE, points=9, shift=0.0, step=1.2), optimizer="adamw")
    )
    for check in check_law(STEP_LAW, table):
        assert check.regret_percent == pytest.approx(0, abs=1e-6)
        assert not check.extrapolated
        assert check.lr == pytest.approx(check.best_lr)
    shifted = read_runs(
        write(
            tmp_path / "off.csv", sweep(NINE, points=9, step=1.2, shift=0, lr=(1.79 / 1.2**2, *STEP[0][1:]))
        )
    )
    for check in check_law(STEP_LAW, shifted):
        assert check.regret_percent == pytest.approx(100 * 0.0106 / 2 * math.log(1.44) ** 2, rel=1e-6)


def test_cells_that_cannot_tell():
    runs = (Run(1e7, 1e9, 1e-3, 1e4, 3.0), Run(1e7, 1e9, 2e-3, 1e4, math.inf))
    gone = Cell(2e7, 1e9, (Run(2e7, 1e9, 1e-3, 1e4, math.inf),))
    (check,) = check_law(STEP_LAW, RunTable("x", (Cell(1e7, 1e9, runs), gone), "adamw", "all_reduce", ""))
    assert (check.loss, check.regret_percent, check.runs, check.diverged) == (None, None, 2, 1)


def laws(*arguments, code=0):
    command = [sys.executable, "-m", "stepline.trainer", "laws", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_the_command(tmp_path):
    runs = write(tmp_path / "runs.csv", sweep(points=5))
    told = json.loads(laws("check", "step-law", runs, "--json").stdout)
    assert told["law"] == "Step Law"
    assert len(told["cells"]) == 9
    assert told["max_regret_percent"] == max(cell["regret_percent"] for cell in told["cells"])
    assert told["notes"] == ["Step Law was fitted with optimizer adamw, these runs with muon"]
    shown = laws("check", "step-law", runs)
    assert "Step Law: regret" in shown.stdout
    assert "(9 of 9 cells)" in shown.stdout
    assert "note: Step Law was fitted with optimizer adamw" in shown.stderr
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())


def test_the_help_has_an_example():
    assert "Example: stepline laws fit" in laws("--help").stdout


def test_extrapolated_cells_are_in_no_mean(tmp_path):
    runs = write(tmp_path / "runs.csv", sweep(NINE[:8], points=3) + sweep(NINE[8:], points=3, shift=2))
    told = json.loads(laws("check", "step-law", runs, "--json").stdout)
    assert [cell["extrapolated"] for cell in told["cells"]] == [False] * 8 + [True]
    assert told["mean_regret_percent"] == pytest.approx(
        np.mean([cell["regret_percent"] for cell in told["cells"][:8]])
    )
    runs = write(tmp_path / "runs.csv", sweep(points=3, shift=2))
    assert (
        "Step Law: no cell has runs around it, near enough to tell" in laws("check", "step-law", runs).stdout
    )


def test_mistakes(tmp_path):
    runs = write(tmp_path / "runs.csv", sweep())
    for arguments, sentence in (
        (("check", "nowhere.json", runs), "no law file 'nowhere.json'"),
        (("check", "step-law", tmp_path / "no.csv"), "cannot read"),
        (("check", runs, runs), "is no law of `stepline laws fit`: Invalid JSON"),
        (("check", runs, find_law("quickstart")), "the law comes first, stepline laws check"),
        (("check", "nope", runs), "no law file 'nope' (shipped: quickstart, step-law)"),
    ):
        done = laws(*arguments, code=2)
        assert done.stderr.startswith("error: ")
        assert sentence in done.stderr
        assert done.stderr.count("\n") == 1
