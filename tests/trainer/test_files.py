"""Files that are whole or absent."""

import errno
import json
import os
import stat

import pytest

from stepline.trainer.errors import UserError
from stepline.trainer.files import locked, new_folder, write_whole
from stepline.trainer.watch.heartbeat import Heartbeat
from stepline.trainer.watch.sent import Sent


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


def test_what_need_not_outlive_a_power_cut_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """A heartbeat, and what wandb was sent: on a slow disk the training would wait with them."""
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("waits for the disk"))
    heartbeat = Heartbeat(
        tmp_path / "heartbeat.json", steps=9, start_step=0, limit_s=60.0, attempt=1, world_size=1
    )
    heartbeat.beat(1, "training")
    Sent(tmp_path / "sent.json", 4.0).note({"step": 3})
    assert json.loads((tmp_path / "heartbeat.json").read_text())["step"] == 1
    assert Sent(tmp_path / "sent.json", 4.0).step == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_what_was_sent_leaves_nothing_behind_where_it_cannot_be_noted(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "replace", full)
    Sent(tmp_path / "sent.json", 4.0).note({"step": 3})
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_takes_the_place_of_what_was_killed_and_of_nothing_else(tmp_path):
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    partial.mkdir()
    (partial / "mine.txt").write_text("a user's")
    with pytest.raises(UserError) as caught, new_folder(output):
        pass
    assert str(caught.value) == (
        f"{partial} would be written and exists already; choose another folder than {output}"
    )
    assert (partial / "mine.txt").read_text() == "a user's"
    (partial / "mine.txt").unlink()
    (partial / ".being-written").touch()  # killed
    (partial / "half").write_text("half")
    with new_folder(output) as folder:
        (folder / "whole").write_text("whole")
    assert [p.name for p in output.iterdir()] == ["whole"]
    assert not partial.exists()


def test_who_may_write_a_folder_may_lock_in_it(tmp_path):
    """As the group of a shared one."""
    before = os.umask(0o002)
    try:
        with locked(tmp_path / "lock", wait=False) as mine:
            assert mine is not None
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o664


@pytest.mark.parametrize("there", [True, False])
def test_a_lock_file_that_cannot_be_opened(tmp_path, monkeypatch, there):
    """One of a colleague's, which the group may not write, or in a folder that is read-only."""
    path, opened = tmp_path / "lock", os.open
    if there:
        path.touch(0o644)

    def refused(name, flags, *more, **options):
        if name == path and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(name, flags, *more, **options)

    monkeypatch.setattr(os, "open", refused)  # root may do all
    with pytest.raises(UserError) as caught, locked(path, wait=False):
        pass
    assert str(caught.value) == (
        f"the lock file {path} cannot be opened (Permission denied); make it one that you may write, or remove it "
        "while nobody holds it"
    )
