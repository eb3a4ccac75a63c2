"""metrics.jsonl where it is large: read in parts, and never held as a whole."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepline.trainer.watch import metrics
from stepline.trainer.watch.metrics import MetricsFile, has_validation, iter_metrics


def test_rows_from_a_step_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"loss": 3.0, "step": 2}\n{"step": 3}\n{"step": 3, "val_loss": 2.0}\n{"st')
    for first, found in ((0, [1, 2, 3, 3]), (2, [2, 3, 3]), (3, [3, 3]), (4, [])):
        assert [row["step"] for row in MetricsFile(path).read(first)] == found
    assert list(MetricsFile(tmp_path / "none.jsonl").read()) == []


def test_a_row_that_is_written_while_the_file_is_read(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    loads = json.loads

    def writes_on(line):
        if not line.endswith(b"\n"):
            with path.open("a") as file:
                file.write('ss": 0.5}\n{"step": 3}\n')
        return loads(line)

    monkeypatch.setattr(metrics.json, "loads", writes_on)
    assert [row["step"] for row in iter_metrics(path)] == [1]
    assert [row["step"] for row in iter_metrics(path)] == [1, 2, 3]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=12),
    st.integers(1, 40),
    st.sampled_from(["", "x", '{"step": 39, "lo']),
)
def test_the_validation_of_a_step(tmp_path_factory, rows, block, end):
    """Found from the end of the file, whatever the blocks in which it is read."""
    path, step, wanted = tmp_path_factory.mktemp("validation") / "metrics.jsonl", 1, {}
    with path.open("w") as file:
        for more, validation in rows:
            step += more
            wanted[step] = wanted.get(step, False) or validation
            file.write(json.dumps({"step": step} | ({"val_loss": None} if validation else {})) + "\n")
        file.write(end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "BLOCK_BYTES", block)
        assert [has_validation(path, s) for s in range(40)] == [wanted.get(s, False) for s in range(40)]
        assert not has_validation(path.with_name("none.jsonl"), 1)
        MetricsFile(path).write({"step": 99})  # looks for the end of the last whole line
    assert [row["step"] for row in iter_metrics(path)][-1] == 99
    assert path.read_text().count("\n") == len(rows) + 1


def test_a_resume_holds_no_more_than_a_few_rows(tmp_path):
    """A mixture of 58 layers and 256 experts: 7 MB of rows."""
    path = tmp_path / "metrics.jsonl"
    load = [[0.9876] * 256] * 58
    with path.open("w") as file:
        for step in range(1, 61):
            file.write(json.dumps({"step": step, "loss": 2.0, "expert_load": load}) + "\n")
        file.write('{"step": 60, "val_loss": 2.0}\n')
    assert path.stat().st_size > 7e6
    tracemalloc.start()
    try:
        file = MetricsFile(path)
        assert file.truncate_after(59)["step"] == 59
        assert not has_validation(path, 59)
        assert sum(1 for _ in file.read()) == sum(1 for _ in file.read(1)) == 59
        file.write({"step": 60})
        MetricsFile(path).write({"step": 61})
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
