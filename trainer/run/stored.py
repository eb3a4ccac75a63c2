"""Checkpoints read: the names and shapes in one, its tensors into those of any layout, the newest that is sound."""

import logging
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from stepline.comm.gather import gathered
from stepline.trainer.errors import Unreadable, UserError
from stepline.trainer.run.manifest import (
    DAMAGED,
    complete_checkpoints,
    damaged,
    damages,
    none_left,
    not_read,
    passed_over,
    retire,
    step_of,
)
from stepline.trainer.run.together import together, together_on_disk

log = logging.getLogger("stepline")


def stored_names(checkpoint: Path) -> set[str]:
    """The names of the tensors in a checkpoint; raises UserError where it is damaged."""
    return set(stored_shapes(checkpoint))


def stored_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes by name; raises as `stored_metadata` does."""
    stored = stored_metadata(checkpoint).state_dict_metadata
    return {name: tuple(tensor.size) for name, tensor in stored.items()}


def stored_metadata(checkpoint: Path) -> Metadata:
    """What DCP says of a checkpoint's tensors; raises UserError where it is damaged or cannot be read now."""
    try:
        return dcp.FileSystemReader(checkpoint).read_metadata()
    except OSError as error:
        raise not_read(checkpoint, ".metadata", error) from error
    except Exception as error:  # an unpickled file may raise anything
        raise damaged(checkpoint, "its metadata cannot be read") from error


def misfit(checkpoint: Path, reason: object) -> UserError:
    """That the tensors of a checkpoint are those of another model."""
    return UserError(f"the weights in {checkpoint} do not fit this model: {reason}")


def load_tensors(
    checkpoint: Path, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Reads the named tensors in place; DTensors of any layout get their part (resharding included).

    group: of gloo, for the planning. Raises UserError where the checkpoint is damaged, cannot be read now, or holds
    other names or shapes.
    """
    alone = not dist.is_initialized()
    with warnings.catch_warnings():
        if alone:  # that a single process loads is what is asked for
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(tensors, checkpoint_id=checkpoint, process_group=group, no_dist=alone)
        except CheckpointException as error:
            for reason, _ in error.failures.values():
                if isinstance(reason, torch.OutOfMemoryError | KeyboardInterrupt):
                    raise
                if str(reason).startswith(("Size mismatch", "Missing key")):
                    raise misfit(checkpoint, reason) from error
                if isinstance(reason, OSError) and not isinstance(reason, FileNotFoundError):
                    raise Unreadable(reason.filename or checkpoint, reason) from error
            stored_metadata(checkpoint)  # of which torch tells no error of the disk
            raise damaged(checkpoint, "its tensors cannot be read") from error


def damages_by_all(checkpoint: Path, group: dist.ProcessGroup | None = None) -> list[str]:
    """What is wrong with a checkpoint's files, of which each rank reads a share, where the checkpoint is for it. A
    collective; raises UserError on all ranks where one of them cannot read its part, or sees no checkpoint there."""

    def mine() -> list[str]:
        try:
            checkpoint.stat()
        except OSError as error:
            raise Unreadable(checkpoint, error) from error
        return damages(checkpoint, dist.get_rank(group), dist.get_world_size(group))

    return sorted({problem for part in gathered(together(mine, group), group) for problem in part})


def check_by_all(checkpoints: Sequence[Path], group: dist.ProcessGroup | None = None) -> None:
    """Raises UserError on all ranks where one of these is damaged. A collective, with as many on every rank: the ranks
    share the reading."""
    for checkpoint in checkpoints:
        if problems := damages_by_all(checkpoint, group):
            raise damaged(checkpoint, problems[0])


def sound_checkpoint(
    newest: Path, run: Path, group: dist.ProcessGroup, *, only_this: bool
) -> tuple[Path, list[str]]:
    """The newest checkpoint up to `newest` whose files are as they were written, the same on all ranks, each of which
    has it in its own `run`.

    A damaged one is named in the second value and no longer counts. Raises UserError when none is left, or when
    `only_this` one is asked for, or when a rank cannot read one: what is wrong there is mended, and nothing is lost.
    A collective: the ranks share the reading.
    """
    notes: list[str] = []
    first = dist.get_rank(group) == 0
    found = together_on_disk(lambda: complete_checkpoints(run) if first else [], run, group)
    # Rank 0's list: a node may see what another has written a while later.
    names = [[p.name for p in found if step_of(p) <= step_of(newest)]]
    dist.broadcast_object_list(names, src=0, group=group)
    for name in reversed(names[0]):
        checkpoint = run / "checkpoints" / name
        if not (problems := damages_by_all(checkpoint, group)):
            return checkpoint, notes
        if only_this:
            raise damaged(checkpoint, problems[0])
        notes.append(passed_over(checkpoint, problems[0]))
        log.warning("%s", notes[-1])
        dist.barrier(group=group)
        together_on_disk(partial(retire, checkpoint, DAMAGED) if first else lambda: None, run, group)
    raise none_left(checkpoint, problems[0])
