"""Files that are whole or absent, and locks. Imports no torch."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stepline.trainer.errors import UserError


class NoLocks(UserError):
    """A file system that cannot lock files."""


def copy_key(path: Path) -> tuple[int, int, int]:
    """What tells a node's own copy of a file from another node's; nodes that share one have the same."""
    status = path.stat()
    # `cp -a` onto two fresh disks may give both copies one number and one time, but not one time of the copying
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def write_whole(path: Path, text: str, *, durable: bool = True) -> None:
    """Writes a file so that it is whole or absent; what it raises leaves nothing behind.

    durable: also after a power cut, for which the disk is waited for; not for what is written again every few seconds.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    if not durable:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_no_broken_link(output: Path) -> None:
    """Raises UserError for a link to nothing, in whose place no folder can be put."""
    if output.is_symlink() and not output.exists():
        raise UserError(f"{output} is a link to {output.readlink()}, which does not exist; remove the link")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yields an empty folder whose content becomes `output` at the end, or nothing where that fails.

    Raises UserError where `output` is not empty or cannot be written.
    """
    check_no_broken_link(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty; choose a new folder")
    if not output.name:  # the current folder
        output = output.absolute()
    partial = output.with_name(output.name + ".partial")
    mark = partial / ".being-written"  # of what a killed program left; all else is somebody's
    if (partial.exists() or partial.is_symlink()) and not mark.exists():
        raise UserError(f"{partial} would be written and exists already; choose another folder than {output}")
    try:
        with suppress(FileNotFoundError):
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        mark.touch()
        yield partial
        mark.unlink()
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}); choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[int | None]:
    """Holds a lock file and yields its descriptor; None when another process holds it and `wait` is false.

    A child that inherits the descriptor holds the lock on, beyond the death of the parent. Raises UserError on a
    file system without locks, and where the file cannot be opened.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # for a group that shares the folder, where the umask lets it write
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise UserError(
            f"the lock file {path} cannot be opened ({error.strerror}); make it one that you may write, or remove it "
            "while nobody holds it"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        except OSError as error:
            raise NoLocks(
                f"{path.parent} is on a file system that cannot lock files ({error.strerror}); choose another folder"
            ) from None
        else:
            yield descriptor
    finally:
        os.close(descriptor)
