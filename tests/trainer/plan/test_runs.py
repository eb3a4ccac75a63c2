"""Reading runs: both headers, divergence, cells, and what is refused."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepline.trainer.errors import UserError
from stepline.trainer.plan.runs import SAME_TOKENS, Run, group, read_runs

from .synthetic import NINE, sweep, write

HEADER = (
    "name,params,tokens,lr,batch_tokens,weight_decay,optimizer,sync,schedule,seed,loss,diverged,seconds\n"
)
ROW = "a,1000,20000,0.001,64,0.1,adamw,all_reduce,linear,1,3.5,0,1\n"
STEP_HEADER = ' h ,ffnh,numh,numl,lr,bs,ti,loss,"smooth loss",exp_name,D,N\n'


def read(tmp_path, text):
    path = tmp_path / "runs.csv"
    path.write_text(text, encoding="utf-8")
    return read_runs(path)


def test_own_runs(tmp_path):
    cells = sweep(NINE)
    cells[0][2][0, 2] = math.inf
    table = read_runs(write(tmp_path / "runs.csv", cells))
    assert (table.runs, table.diverged, len(table.cells)) == (81, 1, 9)
    assert (table.optimizer, table.sync) == ("muon", "all_reduce")
    assert table.assumes == "schedule linear, weight decay 0.1"
    first = table.cells[0]
    assert (first.params, first.tokens, len(first.finished)) == (5e6, 1e8, 8)
    assert first.best() == tuple(cells[0][2][cells[0][2][:, 2].argmin()])


def test_weight_decays_are_numbers_not_texts(tmp_path):
    """By length .08123 came last, as the largest."""
    decays = ("0.1", "0.02", "0.08123", "3e-1", "0.05")
    assert read(tmp_path, HEADER + "".join(ROW.replace(",0.1,", f",{wd},") for wd in decays)).assumes == (
        "schedule linear, weight decay 0.02 to 3e-1"
    )
    assert read(tmp_path, HEADER + ROW.replace(",0.1,", ",,")).assumes == "schedule linear"
    for wd in ("auto", "nan", "-0.1", "inf"):
        with pytest.raises(
            UserError, match=f"line 3: weight_decay is '{wd}'; it must be a number at least 0"
        ):
            read(tmp_path, HEADER + ROW + ROW.replace(",0.1,", f",{wd},"))


def test_a_loss_beyond_any_use_is_one_that_diverged(tmp_path):
    table = read(tmp_path, HEADER + ROW + ROW.replace("3.5", "1e250").replace("0.001,", "0.002,"))
    assert table.diverged == 1
    assert table.cells[0].best() == (0.001, 64.0, 3.5)


def test_step_laws_columns(tmp_path):
    """Sequences of 2048; the smoothed loss; a loss above 1.5 times the cell's best counts as diverged."""
    rows = "\ufeff" + STEP_HEADER
    rows += "960,9368,15,7, 1e-3 ,32,1,2.9, 2.5 ,x, 4e9,2e8\n\n960,9368,15,7,4e-3,32,1,7,7.1,x,4e9,2e8 \n"
    table = read(tmp_path, rows)
    (cell,) = table.cells
    assert [(r.lr, r.batch_tokens, r.loss) for r in cell.runs] == [
        (1e-3, 65536, 2.5),
        (4e-3, 65536, math.inf),
    ]
    assert table.optimizer == "adamw"
    assert "1e-5" in table.assumes


def test_experts_of_equal_size_are_cells_of_their_own(tmp_path):
    text = "lr,bs,smooth loss,D,N,Na\n1e-3,32,2.5,4e9,2e9,2e8\n1e-3,32,2.6,4e9,2e9,3e8\n"
    assert [cell.runs[0].active_params for cell in read(tmp_path, text).cells] == [2e8, 3e8]


def test_seeds_of_a_point_are_averaged_and_one_that_diverged_counts(tmp_path):
    text = HEADER + ROW + ROW.replace("3.5", "3.7") + ROW.replace("0.001,", "0.002,").replace("3.5", "3.4")
    text += ROW.replace("0.001,", "0.002,").replace("3.5,0", ",1")
    (cell,) = read(tmp_path, text).cells
    assert cell.points() == {(0.001, 64.0): pytest.approx(3.6), (0.002, 64.0): math.inf}
    assert cell.best() == (0.001, 64.0, pytest.approx(3.6))


@given(st.lists(st.tuples(st.sampled_from([1e6, 2e6]), st.floats(1e8, 1e10)), min_size=1, max_size=30))
def test_cells_part_the_runs(pairs):
    runs = [Run(n, d, 1e-3, 64, 3.0) for n, d in pairs]
    cells = group(runs)
    together = [run for cell in cells for run in cell.runs]
    assert sorted(map(id, together)) == sorted(map(id, runs))
    for cell in cells:
        tokens = [run.tokens for run in cell.runs]
        assert max(tokens) <= min(tokens) * SAME_TOKENS
        assert {run.params for run in cell.runs} == {cell.params}
        assert min(tokens) <= cell.tokens <= max(tokens)
    of_one_size = [cell.tokens for cell in cells if cell.params == 1e6]
    assert of_one_size == sorted(of_one_size)


def test_tokens_that_differ_by_a_batch_are_one_cell(tmp_path):
    text = HEADER + ROW + ROW.replace("20000", "20040")
    assert len(read(tmp_path, text).cells) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        (HEADER, "has a header but no runs"),
        (HEADER.replace("batch_tokens", "batch") + ROW, "has no column 'batch_tokens'; did you mean 'batch'?"),
        (HEADER.replace("loss", "val") + ROW, "has no column 'loss'"),
        (STEP_HEADER.replace("lr", "rate") + "1,1,1,1,1,1,1,1,1,x,1,1\n", "has no column 'lr'"),
        (HEADER.replace("seed", "lr") + ROW, "has two columns 'lr'"),
        (HEADER + ROW.replace("0.001", "fast"), "line 2: lr is 'fast', which is no number"),
        (HEADER + ROW + ROW.replace("3.5", "-3.5"), "line 3: loss is -3.5; it must be positive"),
        (HEADER + ROW.replace("1000,", "0,"), "line 2: params is 0; it must be positive"),
        (HEADER + ROW.replace("1000,", "1e16,"), "line 2: params is 1e16; it must be between 1 and 1e+15"),
        (HEADER + ROW.replace("20000", "1e19"), "line 2: tokens is 1e19; it must be between 1 and 1e+18"),
        (HEADER + ROW.replace("0.001", "1e300"), "line 2: lr is 1e300; it must be between 1e-20 and 1e+20"),
        (HEADER + ROW.replace("0.001", "1e-300"), "line 2: lr is 1e-300; it must be between 1e-20 and 1e+20"),
        (HEADER + ROW.replace(",64,", ",1e306,"), "line 2: batch_tokens is 1e306; it must be between"),
        (HEADER + ROW.replace("3.5", "1e-200"), "line 2: loss is 1e-200; it must be at least 1e-20"),
        ("lr,bs,loss,D,N\n1e-3,1e306,2.5,4e9,2e9\n", "line 2: bs gives inf tokens; it must be between 1e-20 and 1e+20"),
        ("lr,bs,loss,D,N\n1e-3,1e19,2.5,4e9,2e9\n", "line 2: bs gives 2.048e+22 tokens; it must be between"),
        (
            "lr,bs,loss,D,N,seq_len\n1e-3,32,2.5,4e9,2e9,1e300\n",
            "line 2: bs gives 3.2e+301 tokens; it must be between",
        ),
        (HEADER + ROW.replace("3.5", "nan"), "line 2: loss is nan; it must be positive"),
        (HEADER + ROW.replace("3.5", ""), "line 2 has no loss but is not marked as diverged"),
        (HEADER + ROW.replace(",0,1\n", ",no,1\n"), "line 2: diverged is 'no'; it must be 0 or 1"),
        (HEADER + ROW + ROW.replace("adamw", "muon"), "mixes optimizer adamw and muon"),
        (HEADER + ROW + ROW.replace("all_reduce", "demo"), "mixes sync all_reduce and demo"),
        (HEADER + ROW + ROW.replace("linear", "wsd"), "mixes schedule linear and wsd"),
        ("N,Na,D,lr,bs,loss\n2e9,3e9,4e9,1e-3,32,2.5\n", "line 2: Na is 3e9, more than N 2e9, which counts all"),
        (HEADER + "a,1000\n", "line 2 has 2 fields, the header 13"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path, text, sentence):
    with pytest.raises(UserError, match=r"runs\.csv") as error:
        read(tmp_path, text)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.csv"):
        read_runs(tmp_path / "nowhere.csv")
    (tmp_path / "binary.csv").write_bytes(bytes(np.arange(255, dtype=np.uint8)))
    with pytest.raises(UserError, match=r"binary\.csv"):
        read_runs(tmp_path / "binary.csv")


def test_a_column_without_a_name_is_left_alone(tmp_path):
    """As pandas writes its index."""
    table = read(tmp_path, ",lr,bs,loss,D,N\n0,1e-3,32,2.5,4e9,2e9\n")
    assert [run.active_params for cell in table.cells for run in cell.runs] == [0.0]
