import errno
import json

import pytest

from stepline.trainer.data.discover import discover
from stepline.trainer.data.prepare import prepare
from stepline.trainer.data.sources import ReadOptions, Span, read_pieces
from stepline.trainer.data.units import plan_units
from stepline.trainer.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def planned(folder, options: ReadOptions) -> list[Span]:
    return [span for unit in plan_units(discover([folder], [])[0], options).units for span in unit]


def texts_of(folder, options: ReadOptions = ReadOptions()) -> list[str]:
    return [piece.text for span in planned(folder, options) for piece in read_pieces(span, options)]


def test_parquet_row_groups(tmp_path) -> None:
    texts = [f"text {i} é" for i in range(100)] + [None, ""]
    table = pyarrow.table({"id": range(102), "body": texts})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=17)
    options = ReadOptions(text_key="body")
    assert texts_of(tmp_path, options) == texts[:100]
    with pytest.raises(UserError, match=r"x\.parquet has no column 'text' \(it has id, body\)"):
        planned(tmp_path, ReadOptions())
    with pytest.raises(UserError, match="holds int64, not text"):
        planned(tmp_path, ReadOptions(text_key="id"))
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-100])
    with pytest.raises(UserError, match="not a sound Parquet file"):
        planned(tmp_path, options)


def test_two_columns_of_a_name_and_a_file_that_may_not_be_read(tmp_path, monkeypatch) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(
        UserError, match=r"x\.parquet has several columns 'text'; name another one with --text-key$"
    ):
        planned(tmp_path, ReadOptions())

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(parquet, "ParquetFile", denied)
    with pytest.raises(PermissionError):  # `prepare` says so, and no one is told to download it again
        planned(tmp_path, ReadOptions())


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_kind_of_text_column(tmp_path, kind: str) -> None:
    if kind == "dictionary":
        column = pyarrow.array(["é", "b", None, "é"]).dictionary_encode()
    else:
        column = pyarrow.array(["é", "b", None, "é"], getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    assert texts_of(tmp_path) == ["é", "b", "é"]


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_of_null_are_counted_and_said(tmp_path, tokenizer_file, capsys, workers: int) -> None:
    """In JSON lines as in Parquet; an empty text is a text."""
    rows = ["a few words", None, "", None, "more words"]
    (tmp_path / "in").mkdir()
    parquet.write_table(pyarrow.table({"body": rows}), tmp_path / "in" / "x.parquet", row_group_size=2)
    lines = "".join(json.dumps({"body": text}) + "\n" for text in [*rows, None])
    (tmp_path / "in" / "y.jsonl").write_text(lines)
    meta = prepare(
        [tmp_path / "in"], tmp_path / "out", tokenizer=tokenizer_file, text_key="body", val_share=0.0,
        workers=workers,
    )  # fmt: skip
    assert meta["skipped"] == {"null text": 5}
    assert meta["splits"]["train"]["documents"] == 4
    assert "prepare: left out 5 rows whose 'body' is null\n" in capsys.readouterr().err
