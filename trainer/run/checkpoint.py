"""Checkpoints: torch.distributed.checkpoint (DCP), written in the background, valid only with COMPLETE."""

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from stepline.comm.gather import gathered
from stepline.comm.mesh import patient_group
from stepline.trainer.errors import reason_of
from stepline.trainer.files import write_whole
from stepline.trainer.run.manifest import (
    COMPLETE,
    MANIFEST,
    SMALL,
    STATE,
    SUPERSEDED,
    checkpoint_path,
    file_entry,
    is_ephemeral,
    remove,
    step_of,
    visible_checkpoints,
)

log = logging.getLogger("stepline")

SPARE_BYTES = 16 * 2**20  # beside the tensors: metadata, and what other programs write meanwhile
LEAST_LIMIT_S, SLOWEST = 3600.0, 10e6
"""Seconds that any checkpoint may take, and bytes/s of all ranks: a disk below them stands still."""


class SaveFailed(Exception):
    """A checkpoint could not be written; the run goes on without it."""


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    path: Path
    content: dict[str, Any]
    """Of state.json."""
    kind: str
    needed: int
    """Bytes."""
    thread: threading.Thread | None = None
    error: BaseException | None = field(default=None)


class Checkpointer:
    """Saves in the background; rank 0 makes the folders, completes, and removes old ephemeral checkpoints.

    `save` copies the tensors to host memory before it returns, so training goes on at once; all else, the ranks'
    agreement included, happens in a thread with a gloo group of its own. A checkpoint that cannot be written (a full
    disk) is reported to `on_failure`, on all ranks alike, and the run goes on.
    """

    def __init__(
        self, run: Path, keep: int, device: torch.device, on_failure: Callable[[str], None] = lambda _: None
    ) -> None:
        self.run, self.keep, self.on_failure = run, keep, on_failure
        self.group = patient_group()  # `limit_s` is kept by the watchdog
        self.device = device
        # torch 2.11 and 2.12 would pin all of it anew for each save
        pinned = device.type == "cuda" and torch.__version__ >= (2, 13)
        self.staging = StagingOptions(pinned, False, False, pinned)
        self.stager = DefaultStager(self.staging)
        self.last: Path | None = None
        """The newest checkpoint that this process completed."""
        self.failed = 0
        """Checkpoints in a row that could not be written."""
        self.stalled_s = 0.0
        """Seconds that the last `save` kept the training waiting."""
        self._pending: _Pending | None = None

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], kind: str) -> None:
        """Starts a checkpoint of `step`; the one before is completed first."""
        begun = time.perf_counter()
        self.finish()
        replicas = state.get("replicas", 1)
        needed = SPARE_BYTES + sum(
            t.numel() * t.element_size() * _copies(name, replicas) for name, t in tensors.items()
        )
        pending = _Pending(checkpoint_path(self.run, step), state, kind, needed)
        staged = self.stager.stage(tensors)
        if torch.__version__ < (2, 13):  # whose stagers serve once; later ones keep their buffers
            self.stager = DefaultStager(self.staging)
        pending.thread = threading.Thread(
            target=self._write, args=(pending, staged), daemon=True, name="checkpoint"
        )
        self._pending = pending
        pending.thread.start()
        self.stalled_s = time.perf_counter() - begun

    @property
    def name(self) -> str | None:
        """Of the newest checkpoint that this process completed."""
        return None if self.last is None else self.last.name

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written by this rank."""
        return self._pending is not None and self._pending.thread.is_alive()

    @property
    def limit_s(self) -> float:
        """Seconds from now that the pending checkpoint may take. There is no sign of life to go by: bytes that were
        handed to the system move no further while it brings them to the disk."""
        return LEAST_LIMIT_S + (0 if self._pending is None else self._pending.needed / SLOWEST)

    def poll(self) -> None:
        """Takes note of a checkpoint that is written by now."""
        if not self.busy:
            self.finish()

    def finish(self) -> bool:
        """Waits for the pending checkpoint; whether the newest one asked for is on disk.

        Raises what went wrong in the background when it is no failure of the storage.
        """
        if self._pending is None:
            return self.failed == 0
        pending, self._pending = self._pending, None
        pending.thread.join()
        if pending.error is None:
            self.last, self.failed = pending.path, 0
            return True
        if not isinstance(pending.error, SaveFailed | OSError | CheckpointException):
            raise pending.error
        self.failed += 1
        sentence = f"checkpoint {pending.path.name} could not be saved ({_reason(pending.error)})"
        log.error("%s", sentence)
        self.on_failure(sentence)
        return False

    def _write(self, pending: _Pending, staged: dict[str, torch.Tensor]) -> None:
        """The thread's work, on all ranks; only the last lines make the checkpoint count."""
        path, rank = pending.path, dist.get_rank()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a new thread's is the first one
        try:
            try:
                self._on_rank_0(lambda: self._make_room(pending))
                # all is on the host: with a copy ahead torch would wait for the training's stream
                writer = dcp.FileSystemWriter(path, sync_files=True, per_thread_copy_ahead=0)
                dcp.save(staged, storage_writer=writer, process_group=self.group)
                files = self._entries(path.glob(f"__{rank}_*.distcp"))
                self._on_rank_0(lambda: self._complete(pending, files))
            except (SaveFailed, OSError, CheckpointException):
                if rank == 0:
                    shutil.rmtree(path, ignore_errors=True)  # what was half-written takes room
                raise
        except BaseException as error:
            pending.error = error

    def _entries(self, mine: Iterable[Path]) -> dict[str, dict[str, int]]:
        """What the manifest says of the files of all ranks; a file that cannot be read again is the failure of all."""
        entries: dict[str, dict[str, int]] | str
        try:
            entries = {p.name: file_entry(p) for p in mine}
        except OSError as error:
            entries = _reason(error)
        parts = gathered(entries, self.group)
        if failures := [part for part in parts if isinstance(part, str)]:
            raise SaveFailed(failures[0])
        return {name: entry for part in parts for name, entry in part.items()}

    def _on_rank_0(self, action: Callable[[], None]) -> None:
        """Rank 0's part; its failure is the failure of all."""
        failure: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                failure = [_reason(error)]
        dist.broadcast_object_list(failure, src=0, group=self.group)
        if failure[0] is not None:
            raise SaveFailed(failure[0])

    def _make_room(self, pending: _Pending) -> None:
        """An empty folder on a disk with enough space; what no longer counts makes way, then old ephemeral checkpoints;
        the newest one stays."""
        path = pending.path
        if path.exists():
            shutil.rmtree(path)  # left by an attempt that died while writing, or superseded
        path.mkdir(parents=True)
        useless = visible_checkpoints(self.run, SUPERSEDED)
        while (free := shutil.disk_usage(path).free) < pending.needed:
            if useless:
                _removed(useless.pop(0), shutil.rmtree)
            elif not self._remove_ephemeral(visible_checkpoints(self.run)[:-1], keep=0):
                path.rmdir()
                raise OSError(f"needs {pending.needed / 1e9:.3g} GB on a disk with {free / 1e9:.3g} GB free")

    def _complete(self, pending: _Pending, files: dict[str, dict[str, int]]) -> None:
        """Writes what beside the tensors makes a checkpoint, COMPLETE last; then removes what is no longer kept."""
        path = pending.path
        write_whole(path / STATE, json.dumps(pending.content, indent=1) + "\n")
        for name in SMALL:
            files[name] = file_entry(path / name)
        manifest = {"kind": pending.kind, "step": step_of(path), "torch": torch.__version__, "files": files}
        write_whole(path / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        write_whole(path / COMPLETE, "")
        try:
            self._remove_ephemeral(visible_checkpoints(self.run), keep=self.keep)
        except OSError as error:  # of others: this one counts
            log.warning("old checkpoints of %s cannot be removed (%s)", self.run, reason_of(error))

    def _remove_ephemeral(self, checkpoints: list[Path], keep: int) -> int:
        """Removes all but the newest `keep` of the ephemeral ones; returns how many. What cannot be removed stays."""
        ephemeral = [p for p in checkpoints if is_ephemeral(p)]
        return sum(_removed(checkpoint, remove) for checkpoint in ephemeral[: max(len(ephemeral) - keep, 0)])


def _copies(name: str, replicas: int) -> int:
    """How many tensors of a checkpoint this rank's stands for: each rank, or each replica, has its own of what
    is named after it."""
    if f"rank{dist.get_rank()}." in name:
        return dist.get_world_size()
    return replicas if name.startswith("replica") else 1


def _removed(checkpoint: Path, how: Callable[[Path], None]) -> bool:
    """Whether an old checkpoint could be removed; a warning where it could not."""
    try:
        how(checkpoint)
    except OSError as error:
        log.warning("the old checkpoint %s cannot be removed (%s)", checkpoint, error.strerror)
        return False
    return True


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, of any rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return reason_of(error)
