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
from stepline.trainer.data.verify import sharers
from stepline.trainer.errors import Unreadable, UserError
from stepline.trainer.files import copy_key
from stepline.trainer.run.manifest import (
    DAMAGED,
    MANIFEST,
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
    """What is wrong with a checkpoint's files, where it is for each rank; a collective.

    The ranks that see the same copy share the reading of it. Raises UserError on all ranks where one of them cannot
    read its part, or sees no checkpoint there.
    """
    return [problem for _, problem in _found_by_all(checkpoint, group)]


def check_by_all(checkpoints: Sequence[Path], group: dist.ProcessGroup | None = None) -> None:
    """Raises UserError on all ranks where one of these is damaged, in any rank's copy. A collective, with as many on
    every rank; the reading is shared as by `damages_by_all`."""
    for checkpoint in checkpoints:
        if found := _found_by_all(checkpoint, group):
            raise damaged(Path(found[0][0]), found[0][1])


def _found_by_all(checkpoint: Path, group: dist.ProcessGroup | None) -> list[tuple[str, str]]:
    """(the path of a copy, what is wrong there), alike on all ranks."""

    def copy() -> tuple[int, int, int] | None:
        try:
            checkpoint.stat()
            return copy_key(checkpoint / MANIFEST) if (checkpoint / MANIFEST).exists() else None
        except OSError as error:
            raise Unreadable(checkpoint, error) from error

    place = sharers(gathered(together(copy, group), group), dist.get_rank(group))
    mine = together(lambda: [(str(checkpoint), problem) for problem in damages(checkpoint, *place)], group)
    return sorted({problem for part in gathered(mine, group) for problem in part})


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
