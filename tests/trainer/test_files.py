"""Files that are whole or absent."""

import errno
import os

import pytest

from stepline.trainer.files import write_whole


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch, step):
    path = tmp_path / "config.yaml"
    write_whole(path, "before")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync", full) if step == "fsync" else (type(path), "replace", full)))
        with pytest.raises(OSError, match="No space left"):
            write_whole(path, "after")
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    assert path.read_text() == "before"
