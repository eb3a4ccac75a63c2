"""metrics.jsonl: valid JSON always, every step once after any interruption."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepline.trainer.errors import UserError
from stepline.trainer.watch.metrics import MetricsFile, read_metrics


def steps(path):
    return [row["step"] for row in read_metrics(path)]


def strict(text):
    def refuse(constant):
        raise ValueError(constant)

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_rows_are_on_disk_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1, "loss": 2.5})
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}]
    file.write({"step": 2, "loss": 2.25, "note": "ü"})
    assert read_metrics(path)[1] == {"step": 2, "loss": 2.25, "note": "ü"}


def test_values_that_json_does_not_know(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    assert strict(path.read_text()) == [
        {
            "step": 1,
            "loss": None,
            "loss_is_finite": False,
            "grad_norm": None,
            "grad_norm_is_finite": False,
            "lr": 0.1,
        }
    ]


def test_resume_drops_later_rows_and_writes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(1, 8):
        file.write({"step": step})
        if step % 3 == 0:
            file.write({"step": step, "val_loss": 1.0})
    file.truncate_after(4)
    for step in range(5, 8):
        file.write({"step": step})
    assert steps(path) == [1, 2, 3, 3, 4, 5, 6, 7]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@given(cut=st.integers(0, 200), resume=st.integers(0, 9))
def test_any_cut_leaves_every_step_once(tmp_path_factory, cut, resume):
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(1, 9):
        file.write({"step": step, "loss": 1 / step})
    file.close()
    path.write_bytes(path.read_bytes()[:cut])
    whole = path.read_bytes().count(b"\n")
    assert steps(path)[:whole] == list(range(1, whole + 1))

    again = MetricsFile(path)
    again.truncate_after(resume)
    kept = steps(path)
    assert kept == [s for s in range(1, 9) if s <= resume][: len(kept)]
    again.write({"step": 99})
    assert steps(path) == [*kept, 99]


def test_appending_without_truncation_drops_the_half_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    MetricsFile(path).write({"step": 2})
    assert steps(path) == [1, 2]


def test_a_fresh_start_has_nothing_to_truncate(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl").truncate_after(0)
    assert list(tmp_path.iterdir()) == []


def test_refusals(tmp_path):
    with pytest.raises(UserError, match=r"none.jsonl does not exist"):
        read_metrics(tmp_path / "none.jsonl")
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nwhat\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2, is not a JSON object"):
        read_metrics(path)
