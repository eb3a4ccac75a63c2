"""Which checkpoints a run has, and whether their files are what was written."""

import json
import logging
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

from stepline.trainer.errors import Unreadable, UserError, reason_of

log = logging.getLogger("stepline")

COMPLETE, MANIFEST, STATE = "COMPLETE", "manifest.json", "state.json"
DAMAGED, SUPERSEDED = "DAMAGED", "SUPERSEDED"
"""What COMPLETE is renamed to when a checkpoint no longer counts."""
PERMANENT, EPHEMERAL = "permanent", "ephemeral"
SMALL = (STATE, ".metadata")
"""Files that every start reads, before the ranks share the reading of the others."""
BLOCK = 16 * 2**20


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the run's checkpoint of a step is."""
    return run / "checkpoints" / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step-"))


def _folders(run: Path) -> list[Path]:
    """Those of checkpoints, whole or not, oldest first; a copy that someone keeps under another name is none."""
    named = (p for p in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name))
    return sorted(named, key=step_of)


def complete_checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first; one without COMPLETE is never among them."""
    return [p for p in _folders(run) if (p / COMPLETE).exists()]


def visible_checkpoints(run: Path, mark: str = COMPLETE) -> list[Path]:
    """The run's checkpoints with a mark, oldest first, as far as they can be looked at now. For tidying up: one that a
    bad disk hides is left alone, with a warning."""
    found = []
    for path in _folders(run):
        try:
            if (path / mark).exists():
                found.append(path)
        except OSError as error:
            log.warning("the old checkpoint %s cannot be looked at (%s)", path, reason_of(error))
    return found


def incomplete_checkpoints(run: Path) -> list[Path]:
    """What attempts that died while saving have left, oldest first."""
    marks = (COMPLETE, DAMAGED, SUPERSEDED)
    return [p for p in _folders(run) if not any((p / m).exists() for m in marks)]


def run_of(checkpoint: Path) -> Path:
    """The run's folder to which a checkpoint belongs."""
    return checkpoint.resolve().parent.parent


def find_checkpoint(path: Path, *, checksums: bool = True) -> Path:
    """The checkpoint at `path`, or the newest complete one of the run at `path`, its files checked.

    checksums: read all files, instead of looking at the sizes of large ones. Raises UserError where there is none or it
    is damaged.
    """
    run = None
    if not (path / COMPLETE).is_file():
        found = complete_checkpoints(path)
        if mark := next((m for m in (SUPERSEDED, DAMAGED) if (path / m).is_file()), None):
            why = "the run has gone back behind it" if mark == SUPERSEDED else "it was found damaged"
            raise UserError(f"{path} no longer counts, as {why}; to use it, rename its {mark} to {COMPLETE}")
        if not found:
            raise UserError(f"{path} is neither a run with a complete checkpoint nor a checkpoint")
        run, path = path, found[-1]
    problems = damages(path, checksums=checksums)
    if problems:
        # a run that trains on has removed it for a newer one
        if run is not None and not (path / COMPLETE).exists():
            return find_checkpoint(run, checksums=checksums)
        raise damaged(path, problems[0])
    return path


def file_entry(path: Path) -> dict[str, int]:
    """Size in bytes and crc32 of a file, as the manifest holds them."""
    checksum = size = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
    return {"size": size, "crc32": checksum}


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's manifest.json: `kind` (permanent or ephemeral), `step`, `files`; raises UserError."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = {
            name: {key: int(entry[key]) for key in ("size", "crc32")}
            for name, entry in dict(manifest["files"]).items()
        }
        return {"kind": manifest["kind"], "step": int(manifest["step"]), "files": files}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise not_read(checkpoint, MANIFEST, error) from error


def is_ephemeral(checkpoint: Path) -> bool:
    """Whether it makes way for newer ones; what cannot be read is not ours to remove."""
    try:
        return read_manifest(checkpoint)["kind"] == EPHEMERAL
    except UserError:
        return False


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors: step, tokens, data cursor, fingerprints; raises UserError."""
    try:
        return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise not_read(checkpoint, STATE, error) from error


def damages(checkpoint: Path, rank: int = 0, ranks: int = 1, *, checksums: bool = True) -> list[str]:
    """What is wrong with a checkpoint's files, one phrase each; empty where all is well.

    Every rank looks at the sizes of all files and at the checksums of its share of them; without `checksums`, at those
    of small files. A missing file is damage; raises Unreadable for one that is there and cannot be read.
    """
    try:
        files = read_manifest(checkpoint)["files"]
    except Unreadable:
        raise
    except UserError:
        return [f"{MANIFEST} cannot be read"]
    found = []
    for i, (name, entry) in enumerate(sorted(files.items())):
        path = checkpoint / name
        try:
            size = path.stat().st_size
            reads = i % ranks == rank if checksums else name in SMALL
            if size != entry["size"]:
                found.append(f"{name} has {size} bytes instead of {entry['size']}")
            elif reads and file_entry(path) != entry:
                found.append(f"{name} has another checksum than when it was written")
        except FileNotFoundError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
        except OSError as error:
            raise Unreadable(path, error) from error
    return found


def short(checkpoint: Path) -> bool:
    """Whether a file is missing or has another size than when it was written, or a small one another content; raises
    nothing."""
    try:
        return bool(damages(checkpoint, checksums=False))
    except Unreadable:
        return False


def not_read(checkpoint: Path, name: str, error: Exception) -> UserError:
    """The sentence for a file of a checkpoint that is asked for: whether it is damaged, or cannot be read now."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return Unreadable(checkpoint / name, error)
    return damaged(checkpoint, f"{name} cannot be read")


def damaged(checkpoint: Path, problem: str) -> UserError:
    """The sentence for a checkpoint that was asked for and cannot be used."""
    earlier = [p.name for p in complete_checkpoints(run_of(checkpoint)) if step_of(p) < step_of(checkpoint)]
    instead = f"use an earlier one ({', '.join(earlier)})" if earlier else "its run has no earlier one"
    return UserError(f"the checkpoint {checkpoint} is damaged; {instead} ({problem})")


def passed_over(checkpoint: Path, problem: str) -> str:
    """The sentence for a checkpoint that would have been the one to go on from."""
    return f"the checkpoint {checkpoint} is damaged ({problem}): the one before it is used"


def none_left(checkpoint: Path, problem: str) -> UserError:
    """The sentence for a run whose checkpoints are all damaged; `checkpoint` is the last one looked at."""
    return UserError(
        f"every checkpoint of {run_of(checkpoint)} is damaged ({problem} in {checkpoint.name}); "
        f"restore one (and rename its {DAMAGED} to {COMPLETE}), or remove {checkpoint.parent} to start again"
    )


def damaged_checkpoints(run: Path) -> list[Path]:
    """Those that were found damaged, oldest first."""
    return [p for p in _folders(run) if (p / DAMAGED).exists()]


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint; should that be cut short, it is an incomplete one."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def retire(checkpoint: Path, mark: str) -> None:
    """Takes a checkpoint out of those that count; its files stay."""
    (checkpoint / COMPLETE).rename(checkpoint / mark)
