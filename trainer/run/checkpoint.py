"""Checkpoints: torch.distributed.checkpoint, written in the background, valid only with COMPLETE."""

import json
import os
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from stepline.trainer.errors import UserError

COMPLETE = "COMPLETE"
STATE = "state.json"


def complete_checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first; one without COMPLETE is never among them."""
    return sorted(p.parent for p in (run / "checkpoints").glob(f"step-*/{COMPLETE}"))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at `path`, or the newest complete one of the run at `path`; raises UserError."""
    if (path / COMPLETE).is_file():
        return path
    found = complete_checkpoints(path)
    if not found:
        raise UserError(f"{path} is neither a run with a complete checkpoint nor a checkpoint")
    return found[-1]


def run_of(checkpoint: Path) -> Path:
    """The run's folder to which a checkpoint belongs."""
    return checkpoint.resolve().parent.parent


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors: step, tokens, data cursor, fingerprints."""
    try:
        return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(checkpoint) from error


def load_tensors(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Reads the named tensors in place; DTensors of any layout get their part (resharding included).

    Raises UserError where the checkpoint is damaged or holds other names or shapes.
    """
    alone = not dist.is_initialized()
    with warnings.catch_warnings():
        if alone:  # that a single process loads is what is asked for
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(tensors, checkpoint_id=checkpoint, no_dist=alone)
        except CheckpointException as error:
            for reason, _ in error.failures.values():
                if isinstance(reason, torch.OutOfMemoryError | KeyboardInterrupt):
                    raise
                if str(reason).startswith(("Size mismatch", "Missing key")):
                    raise UserError(f"the weights in {checkpoint} do not fit this model: {reason}") from error
            raise _damaged(checkpoint) from error


def _damaged(checkpoint: Path) -> UserError:
    earlier = [p.name for p in complete_checkpoints(run_of(checkpoint)) if p.name < checkpoint.name]
    instead = f"use an earlier one ({', '.join(earlier)})" if earlier else "its run has no earlier one"
    return UserError(f"the checkpoint {checkpoint} is damaged; {instead}")


class Checkpointer:
    """Saves in the background; rank 0 completes, names and removes checkpoints.

    Tensors are copied before `save` returns, so training goes on at once. The planning between ranks has a gloo
    group of its own: it runs in a thread beside the training's collectives.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.folder = run / "checkpoints"
        self.keep = keep
        self.group = dist.new_group(backend="gloo")
        self.pending: tuple[Path, dict[str, Any], Future] | None = None

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Starts a checkpoint of `step`; the one before is completed first."""
        self.finish()
        path = self.folder / f"step-{step:06d}"
        if dist.get_rank() == 0:
            shutil.rmtree(path, ignore_errors=True)  # left by an attempt that died while writing
            path.mkdir(parents=True)
        dist.barrier(group=self.group)
        future = dcp.async_save(tensors, checkpoint_id=path, process_group=self.group)
        self.pending = (path, state, future)

    def poll(self) -> None:
        """Completes the pending checkpoint if it is written. Not a collective: rank 0 alone completes."""
        if self.pending is not None and self.pending[2].done():
            self.finish()

    def finish(self) -> None:
        """Waits for the pending checkpoint; raises what went wrong in the background."""
        if self.pending is None:
            return
        path, state, future = self.pending
        self.pending = None
        future.result()
        if dist.get_rank() == 0:
            _write(path / STATE, json.dumps(state, indent=1) + "\n")
            _write(path / COMPLETE, "")
            for old in complete_checkpoints(path.parent.parent)[: -self.keep]:
                (old / COMPLETE).unlink()
                shutil.rmtree(old)


def _write(path: Path, text: str) -> None:
    """Writes a file so that it is whole or absent, also after a power cut."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
