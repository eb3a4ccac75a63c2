"""`stepline laws fit`: what is recovered, when exponents are free, what is noted, what is refused, what is written."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from stepline.trainer.errors import UserError
from stepline.trainer.plan.edges import cell_notes
from stepline.trainer.plan.explain import plan_json
from stepline.trainer.plan.fit import fit_law
from stepline.trainer.plan.law_file import LawFile, read_law, write_law
from stepline.trainer.plan.laws import STEP_LAW
from stepline.trainer.plan.laws_command import run_fit
from stepline.trainer.plan.planner import Inputs, make_plan
from stepline.trainer.plan.runs import Cell, Run, read_runs

from .synthetic import NINE, sweep, write

OTHER = {"lr": (1.5, -0.6, 0.2), "batch": (0.6, 0.45)}


def fitted(tmp_path, cells, draws=200, **constants):
    return fit_law(read_runs(write(tmp_path / "runs.csv", cells, **constants)), "mine", draws)


def inside(value, interval):
    return interval[0] < value < interval[1]


def test_a_law_is_recovered_within_its_interval(tmp_path):
    law = fitted(tmp_path, sweep(noise=0.001, scatter=(0.1, 0.1)))
    mine = law.law()
    assert mine.lr_law.exponents == STEP_LAW.lr_law.exponents
    for n, d in NINE:
        assert inside(STEP_LAW.lr(n, d), mine.lr_law.interval(n, d))
        assert inside(STEP_LAW.batch_tokens(d), mine.batch_law.interval(d))
    assert (law.cells, law.runs, law.diverged, law.optimizer) == (9, 81, 0, "muon")
    assert law.params == (5e6, 8e7)
    assert law.tokens_per_param == (1e8 / 8e7, 2e9 / 5e6)
    assert law.assumes == "schedule linear, weight decay 0.1"


def test_intervals_widen_away_from_the_cells_where_exponents_are_kept(tmp_path):
    """The truth has other exponents, such that it is 1.7 of Step Law's standard errors away where N and D are large."""
    spreads = STEP_LAW.lr_law.spread, STEP_LAW.batch_law.spread
    lr_covariance, batch_covariance = (np.array(s.covariance)[1:, 1:] for s in spreads)
    far = np.log([7e9 / 2e7, 2e12 / 4.5e8])
    off = 1.7 * lr_covariance @ far / np.sqrt(far @ lr_covariance @ far)
    (n, d), (b,) = STEP_LAW.lr_law.exponents, STEP_LAW.batch_law.exponents
    lr, batch = (1.79, n + off[0], d + off[1]), (0.58, b + 1.7 * float(batch_covariance[0, 0]) ** 0.5)
    law = fitted(tmp_path, sweep(noise=0.001, scatter=(0.1, 0.1), lr=lr, batch=batch)).law()
    assert law.lr_law.exponents == STEP_LAW.lr_law.exponents
    widths = []
    for params, tokens in ((2e7, 4.5e8), (1e9, 2e10), (7e9, 2e12)):
        interval = law.lr_law.interval(params, tokens), law.batch_law.interval(tokens)
        widths.append([math.log(high / low) for low, high in interval])
        assert inside(lr[0] * params ** lr[1] * tokens ** lr[2], interval[0])
        assert inside(batch[0] * tokens ** batch[1], interval[1])
    for near, middle, farthest in zip(*widths, strict=True):
        assert near < middle < farthest
    # exponents that are as uncertain as the published ones: their share of the far interval
    known = float(far @ lr_covariance @ far)
    assert widths[2][0] ** 2 == pytest.approx(
        widths[0][0] ** 2 + (2 * spreads[0].quantile) ** 2 * known, rel=0.02
    )


def test_one_cell_gives_a_law_and_says_what_its_interval_lacks(tmp_path):
    law = fitted(tmp_path, sweep(NINE[:1], noise=0.0002, seed=1))
    assert inside(STEP_LAW.lr(*NINE[0]), law.law().lr_law.interval(*NINE[0]))
    assert "one cell, how cells differ is not in it" in law.method
    assert law.loss.left_out_error_percent is None


def test_exponents_are_kept_where_the_runs_do_not_carry_them(tmp_path):
    two_sizes = [(n, d) for n in (5e6, 8e7) for d in (1e8, 4e8, 2e9)]
    together = [(n, 20 * n) for n in np.geomspace(5e6, 8e7, 9)]
    for cells, why in (
        (sweep(two_sizes, points=5), "2 N, 3 D"),
        (sweep(two_sizes[:4], points=5), "4 cells"),
        (sweep(points=5, noise=0.003, scatter=(0.2, 0.2)), "95 % interval would be"),
        (sweep(together, points=5), "N and D rise together"),
        ([(n, d, rows[1:]) for n, d, rows in sweep()], "at least 8 runs a cell"),
    ):
        law = fitted(tmp_path, cells)
        assert law.lr.exponents == list(STEP_LAW.lr_law.exponents)
        assert law.batch_tokens.exponents == list(STEP_LAW.batch_law.exponents)
        assert law.method.startswith("two intercepts fitted, Step Law's exponents kept")
        assert why in law.method


def test_exponents_are_free_where_the_runs_carry_them(tmp_path):
    cells = [(n, d) for n in np.geomspace(5e6, 1e9, 4) for d in np.geomspace(1e8, 1e11, 4)]
    law = fitted(tmp_path, sweep(cells, points=5, noise=0.0005, shift=0.1, **OTHER))
    assert law.method.startswith("intercepts and exponents fitted")
    intervals = law.law().lr_law.spread.exponent_intervals() + law.law().batch_law.spread.exponent_intervals()
    for true, found in zip((-0.6, 0.2, 0.45), intervals, strict=True):
        assert inside(true, found)
        assert found[1] - found[0] < 0.15
    low, high = law.law().lr_law.interval(7e9, 2e12)
    assert low < 1.5 * 7e9**-0.6 * 2e12**0.2 < high


def test_runs_that_diverged_are_kept_as_data(tmp_path):
    """Those that diverge are counted, do not move the fit, bound the grid, and a law above one is noted."""
    cells = sweep(points=5, noise=0.001)
    before = fitted(tmp_path, cells)
    rows = []
    for n, d, runs in cells:
        above = runs[runs[:, 0] == runs[:, 0].max()] * [2, 1, math.inf]
        rows.append((n, d, np.concatenate([runs, above])))
    after = fitted(tmp_path, rows)
    assert after.diverged == 45
    assert after.runs == before.runs + 45
    assert after.lr.scale == pytest.approx(before.lr.scale)
    n, d, runs = rows[0]
    lowest = np.array([[STEP_LAW.lr(n, d) / 2, STEP_LAW.batch_tokens(d) * 2, math.inf]])
    rows[0] = (n, d, np.concatenate([runs, lowest]))
    (note,) = [note for note in fitted(tmp_path, rows).notes if "diverged, the law says" in note]
    assert "N = 5e+06, D = 1e+08" in note


def test_a_cell_of_which_every_run_diverged_is_noted(tmp_path):
    cells = sweep(points=5)
    cells[3][2][:, 2] = math.inf
    law = fitted(tmp_path, cells)
    assert (law.cells, law.diverged) == (8, 25)
    assert any("all 25 runs diverged; add runs with lr below" in note for note in law.notes)


def grid_cell(losses):
    runs = [
        Run(1e7, 1e9, lr, batch, loss)
        for (lr, batch), loss in zip([(r, b) for r in (1e-3, 2e-3, 4e-3) for b in (8e3, 16e3, 32e3)], losses)
    ]
    return Cell(1e7, 1e9, tuple(runs))


@pytest.mark.parametrize(
    ("best", "words"),
    [
        (4, None),
        (1, "the best run has the lowest learning rate of its grid; runs with lr 0.0005 would extend it"),
        (7, "the best run has the highest learning rate of its grid; runs with lr 0.008 would extend it"),
        (3, "the best run has the lowest batch of its grid; runs with 4,000 tokens a batch would extend it"),
        (
            8,
            "the highest learning rate and the highest batch of its grid; runs with lr 0.008 and 64,000 tokens",
        ),
    ],
)
def test_an_optimum_on_the_edge_says_which_runs_would_extend_the_grid(best, words):
    notes = cell_notes(grid_cell([3.0 if i == best else 3.1 for i in range(9)]))
    assert (notes == []) if words is None else (len(notes) == 1 and words in notes[0])


def test_next_to_a_learning_rate_that_diverges_is_no_edge():
    assert cell_notes(grid_cell([3.1, 3.1, 3.1, 3.1, 3.0, 3.1, math.inf, math.inf, math.inf])) == []


def test_one_batch_only_is_an_edge():
    runs = tuple(Run(1e7, 1e9, lr, 8e3, loss) for lr, loss in ((1e-3, 3.1), (2e-3, 3.0), (4e-3, 3.1)))
    (note,) = cell_notes(Cell(1e7, 1e9, runs))
    assert "only batch" in note
    assert "4,000 tokens a batch and 16,000" in note


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        (lambda: sweep(NINE[:1], points=2), "has one cell (N = 5e+06, D = 1e+08) with 4 runs near its best"),
        (lambda: [(n, d, rows[:1]) for n, d, rows in sweep()], "has 9 runs near the best of their 9 cells"),
        (lambda: [(n, d, rows[1::3]) for n, d, rows in sweep(points=3)], "has one batch a cell"),
        (lambda: [(n, d, rows[:3]) for n, d, rows in sweep(points=3)], "has one learning rate a cell"),
        (lambda: sweep(points=2), "too few learning rates or batches a cell"),
        (lambda: [(n, d, rows * [1, 1, 0] + [0, 0, 3]) for n, d, rows in sweep(points=5)], "show no minimum"),
        (lambda: [(n, d, np.stack([r[:, 0], r[:, 1], 6 - r[:, 2] / 3], -1)) for n, d, r in sweep()], "show no minimum"),
        (lambda: sweep(points=5, shift=4.5), "lies far outside of its runs: N = 5e+06, D = 1e+08: the best run"),
        (lambda: [(n, d, rows * [1, 1, math.inf]) for n, d, rows in sweep()], "all 81 runs of"),
    ],
)  # fmt: skip
def test_runs_that_identify_no_law_are_refused(tmp_path, cells, sentence):
    with pytest.raises(UserError) as error:
        fitted(tmp_path, cells())
    assert sentence in str(error.value)
    assert "runs.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_fit_does_not_depend_on_the_order_of_the_rows(tmp_path):
    table = read_runs(write(tmp_path / "runs.csv", sweep(noise=0.001)))
    lines = (tmp_path / "runs.csv").read_text().splitlines()
    order = np.random.default_rng(0).permutation(len(lines) - 1) + 1
    (tmp_path / "runs.csv").write_text("\n".join([lines[0], *(lines[i] for i in order)]))
    a, b = fit_law(table, "x", 50), fit_law(read_runs(tmp_path / "runs.csv"), "x", 50)
    assert a.lr.scale == pytest.approx(b.lr.scale, rel=1e-9)


def test_the_file_holds_all_and_the_plan_uses_it(tmp_path):
    content = fitted(tmp_path, sweep(noise=0.001, scatter=(0.1, 0.1)))
    write_law(content, tmp_path / "law.json")
    written = json.loads((tmp_path / "law.json").read_text())
    assert written.keys() == set(LawFile.model_json_schema()["properties"])
    assert LawFile.model_validate(written) == content
    law = read_law(tmp_path / "law.json")
    assert law == content.law()
    n, d = 2e7, 1e9
    plan = make_plan(Inputs(n, d, optimizer="muon"), law)
    told = plan_json(plan)
    assert told["ideal"]["lr"] == pytest.approx(content.lr.scale * n**-0.713 * d**0.307)
    assert told["expected_loss"] == pytest.approx(1.5 + 300 / n**0.3478 + 1500 / d**0.3658, rel=0.002)
    assert told["expected_loss_own"] is True
    assert "mine (own fit: 81 runs in 9 cells): L = " in told["expected_loss_of"]
    published = plan_json(make_plan(Inputs(1e9, 2e10)))
    assert published["expected_loss_own"] is False
    assert "Epoch" in published["expected_loss_of"]


def test_a_file_without_a_loss_is_read(tmp_path):
    content = fitted(tmp_path, sweep())
    text = content.model_dump(mode="json", exclude={"loss", "notes"})
    (tmp_path / "law.json").write_text(json.dumps(text))
    assert read_law(tmp_path / "law.json").loss_law is None


def laws(*arguments, code=0):
    command = [sys.executable, "-m", "stepline.trainer", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    return done


def test_the_commands(tmp_path):
    runs, out = write(tmp_path / "runs.csv", sweep(points=5, noise=0.001, shift=1.5)), tmp_path / "own.json"
    shown = laws("laws", "fit", runs, "-o", out)
    assert "225 runs in 9 cells, 0 diverged; muon, all_reduce" in shown.stdout
    assert "95 % interval" in shown.stdout
    assert "note: N = " in shown.stderr
    assert json.loads(laws("laws", "fit", runs, "-o", out, "--json").stdout) == json.loads(out.read_text())
    planned = laws("plan", "--params", "2e7", "--tokens", "1e9", "--law", out)
    assert "by own: L = " in planned.stdout
    done = laws("laws", "fit", runs, "-o", tmp_path / "no" / "law.json", code=2)
    assert "make it first" in done.stderr
    assert "Example: stepline laws fit" in laws("laws", "fit", "--help").stdout


def test_what_is_there_is_kept(tmp_path):
    """A law is written over a law, over nothing else, and nothing is left behind."""
    runs = write(tmp_path / "runs.csv", sweep())
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    for output, sentence in (
        ("runs.csv", "holds the runs"),
        ("mine.txt", "exists and is no law"),
        ("folder", "is a folder"),
    ):
        with pytest.raises(UserError, match=sentence):
            run_fit(str(runs), tmp_path / output, None, False)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()} == before


def test_neither_torch_nor_scipy_is_imported():
    program = (
        "import sys, stepline.trainer.plan.laws_command as c; print({'torch', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
