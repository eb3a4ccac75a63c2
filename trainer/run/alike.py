"""Whether all ranks were started for the same run; asked before anything that ranks do together could go wrong."""

import json
import zlib
from collections.abc import Sequence
from typing import Any

from stepline.comm.gather import gathered
from stepline.trainer.config import Config
from stepline.trainer.config_io import dump, flatten
from stepline.trainer.errors import UserError
from stepline.trainer.run.manifest import find_checkpoint, read_manifest
from stepline.trainer.run.start import Job

MAY_DIFFER = (
    # Paths: a node may have its own. What the data's folders hold is compared, and the replicas' first weights.
    "run.folder", "data.path", "data.sources", "budget.law", "run.init_from",
    # How a rank reads, computes and watches itself.
    "data.prefetch", "data.verify", "run.compile", "run.profile",
    # Rank 0's.
    "logging.wandb", "logging.project",
)  # fmt: skip
"""Keys that need not be the same on all ranks."""
BY_HAND = ("override", "file", "base")
"""How the origin of a value begins that a user wrote; the others follow from those or are defaults."""


def check_ranks_alike(job: Job) -> None:
    """Raises UserError, on all ranks, where they have settled on different runs: with configs of their own, with other
    data or checkpoints, or on unequal devices."""
    checkpoint = job.resume_from and job.resume_from.name
    mine = (job.fingerprints, checkpoint, _first_weights(job), compared(job.config), job.origins)
    fingerprints, starts, weights, configs, origins, on_node = zip(*gathered((*mine, job.world.local_size)))
    if problems := [problem for *_, problem in weights if problem]:
        raise UserError(problems[0])
    if len(texts := _different(fingerprints)) > 1:
        raise UserError(
            f"the ranks' folders of data hold different texts (fingerprints {' and '.join(texts)}); give all ranks "
            "the same data, or copies of it (data.path, data.sources)"
        )
    if len(names := _different(starts)) > 1:
        raise UserError(
            f"the ranks go on from different checkpoints ({', '.join(names)}); give all of them the same --resume"
        )
    if len({checksum for checksum, path, _ in weights if path}) > 1:
        raise UserError(
            f"the ranks start from different weights ({', '.join(_different([path for _, path, _ in weights]))}); give "
            "all of them the same checkpoint, or copies of it (run.init_from)"
        )
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: _different([config.get(key) for config in configs]) for key in keys}
    differ = [key for key in keys if len(values[key]) > 1]
    if not differ:
        return
    by_hand = {key for key in differ for rank in origins if rank.get(key, "").startswith(BY_HAND)}
    key = min(differ, key=lambda key: key not in by_hand)  # what follows from others comes last
    why = "configs have"
    if key in ("parallel.shard", "parallel.micro_batch") and key not in by_hand:
        why, counts = "devices differ in memory and lead to", sorted(set(on_node))
        if len(counts) > 1:  # the ranks of a node share its memory and its links
            why = f"nodes hold unequal numbers of ranks ({' and '.join(map(str, counts))}) and lead to"
    raise UserError(
        f"the ranks' {why} different values of {key} ({', '.join(values[key])}); set the same for all"
    )


def _first_weights(job: Job) -> tuple[int, str, str]:
    """The checkpoint of run.init_from, where this attempt reads it: a checksum of what its manifest says of the files
    with its tensors (others name times and places), its path (else none), and why it can no longer be read."""
    config = job.config
    if config.run.init_from is None or (job.resume_from is not None and config.optimizer.only == "all"):
        return 0, "", ""
    try:
        checkpoint = find_checkpoint(config.run.init_from, checksums=False)
        entries = read_manifest(checkpoint)["files"]
    except UserError as error:  # for all ranks: one that ended alone would leave the others waiting
        return 0, "", str(error)
    files = sorted(item for item in entries.items() if item[0].endswith(".distcp"))
    return zlib.crc32(repr(files).encode()), str(checkpoint), ""


def compared(config: Config) -> dict[str, Any]:
    """Every value that must be the same on all ranks, by its dotted key."""
    values = {key: value for key, value in flatten(dump(config)).items() if key not in MAY_DIFFER}
    values["data.sources"] = [source.weight for source in config.data.folders()]
    values["run.init_from"] = None if config.run.init_from is None else "given"
    return {key: value for key, value in values.items() if value != {}}


def _different(values: Sequence[Any]) -> list[str]:
    """The distinct ones of `values`, as text."""
    return sorted({value if isinstance(value, str) else json.dumps(value) for value in values})
