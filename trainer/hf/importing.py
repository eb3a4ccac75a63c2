"""A folder of Hugging Face as a run, from whose weights training goes on. Nothing in the folder is run."""

import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from stepline.models.config import ModelConfig
from stepline.models.hf import IN_OLD_FILES, config_from_hf, from_hf_matrix
from stepline.models.transformer import Transformer
from stepline.trainer.data.tokenizer import load_tokenizer
from stepline.trainer.errors import UserError, first_line
from stepline.trainer.files import new_folder, write_whole
from stepline.trainer.hf.custom import MODEL_TYPE, from_custom_name
from stepline.trainer.hf.shards import Stored, read_folder
from stepline.trainer.run.folder import keep_tokenizer
from stepline.trainer.run.manifest import COMPLETE, MANIFEST, PERMANENT, STATE, checkpoint_path, file_entry
from stepline.trainer.run.state import model_tensors

PIECE_BYTES = 64 * 2**20
"""What is read, and written, at once."""
LONGEST_WINDOW = 4096
"""Tokens of a training window in the run's config.yaml, where the model takes as many."""


@dataclass
class Imported:
    """What was made."""

    run: Path
    architecture: str
    parameters: int
    notes: list[str]
    next: list[str]
    """The commands that a user gives next."""


@dataclass(frozen=True)
class Piece:
    """Rows of a parameter, or of one expert's matrix in a stack, and where they stand in the files."""

    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    source: Stored | None
    """None: zeros."""
    start: int
    """First row in the source."""
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The values, `shape`, in memory of their own."""
        if self.source is None:
            return torch.zeros(self.shape, dtype=self.dtype)
        rows = self.shape[1] if len(self.whole) > len(self.source.shape) else self.shape[0]
        return self.source.read(self.start, self.start + rows).view(self.shape)


def import_model(folder: Path, output: Path) -> Imported:
    """Makes the run `output`, which holds the folder's weights as its checkpoint of step 0.

    The values stay in the type of the files. Raises UserError for a folder that is no model, lacks a file or holds
    an architecture that Stepline does not have.
    """
    raw = _read_config(folder)
    architecture = (raw.get("architectures") or [raw.get("model_type")])[0]
    config, positions = _model_config(raw, folder)
    custom = raw.get("model_type") == MODEL_TYPE
    pieces = plan_pieces(folder, config, custom=custom)
    with new_folder(output) as partial:
        note = _write_tokenizer(folder, partial)
        _write_run_config(config, positions, partial, None if note else output.absolute() / "data")
        state = {
            "step": 0, "tokens": 0, "replicas": 1, "fingerprints": [], "architecture": architecture,
            "max_positions": positions, "bos_token_id": raw.get("bos_token_id"),
        }  # fmt: skip
        write_checkpoint(checkpoint_path(partial, 0), pieces, state)
    tokenizer = "" if note else f" --tokenizer {output}/data"
    commands = [
        f"stepline prepare TEXT --output DATA{tokenizer}",
        f"stepline train {output}/config.yaml data.path=DATA budget.tokens=1e9 precision.compute=auto "
        f"run.init_from={output} run.folder={output}-trained",
    ]
    parameters = sum(math.prod(piece.shape) for piece in pieces if piece.source is not None)
    return Imported(output, str(architecture), parameters, [note] if note else [], commands)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no model's folder: it has no config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); download it again") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is no model's configuration; give a model's folder")
    return raw


def _model_config(raw: dict[str, Any], folder: Path) -> tuple[ModelConfig, int]:
    """The model, and the longest sequence that it was trained on."""
    try:
        if raw.get("model_type") == MODEL_TYPE:
            return ModelConfig.model_validate(raw["stepline"]), int(raw["max_position_embeddings"])
        return config_from_hf(raw)
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'} lacks {error.args[0]!r}; download it again") from error
    except (ValueError, TypeError) as error:
        found = getattr(error, "errors", None)
        text = found()[0]["msg"] if found is not None else str(error)
        raise UserError(f"{folder} cannot be imported: {text}") from error


def plan_pieces(folder: Path, config: ModelConfig, *, custom: bool) -> list[Piece]:
    """Where each part of the model's parameters stands in the folder's files, in the order of the files.

    custom: the names are those of Stepline's own modelling code. Raises UserError where the files are not a model of
    this configuration.
    """
    found: dict[str, dict[int | None, Stored]] = {}
    for name, stored in read_folder(folder).items():
        if IN_OLD_FILES.fullmatch(name) or (name == "lm_head.weight" and config.tied_embeddings):
            continue
        try:
            ours, expert = (from_custom_name(name), None) if custom else from_hf_matrix(name)
        except KeyError:
            raise UserError(
                f"{folder} holds {name}, which its architecture has no place for in Stepline"
            ) from None
        found.setdefault(ours, {})[expert] = stored
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in model_tensors(Transformer(config)).items()}
    pieces: list[Piece] = []
    for ours, parts in found.items():
        shape = shapes.pop(f"model.{ours}", None)
        if shape is None:
            raise UserError(f"{folder} holds {ours}, which the model of its config.json does not have")
        stack = None not in parts
        if stack and parts.keys() != set(range(shape[0])):
            raise UserError(f"{folder} lacks some of the {shape[0]} experts of {ours}; download it again")
        dtype = next(iter(parts.values())).dtype
        for expert, stored in parts.items():
            if stored.shape != (shape[1:] if stack else shape) or stored.dtype != dtype:
                raise UserError(f"{ours} in {stored.file} does not have the shape that config.json gives it")
            pieces += _cut(f"model.{ours}", stored, shape, expert)
    for name in [n for n in shapes if n.endswith(".balance_bias")]:  # a stock mixture has none
        shape = shapes.pop(name)
        pieces.append(Piece(name, (0,), shape, shape, None, 0, torch.float32))
    if shapes:
        missing = min(shapes).removeprefix("model.")
        raise UserError(f"{folder} lacks the weights of {missing}; download it again")
    return pieces


def _cut(name: str, stored: Stored, whole: tuple[int, ...], expert: int | None) -> list[Piece]:
    """A tensor in the files as pieces of at most PIECE_BYTES, unless one row is larger."""
    rows = stored.shape[0]
    size = stored.dtype.itemsize * math.prod(stored.shape[1:])
    step = max(1, PIECE_BYTES // max(size, 1))
    cut = []
    for start in range(0, rows, step):
        shape = (min(step, rows - start), *stored.shape[1:])
        offset = (start,) + (0,) * (len(shape) - 1)
        if expert is not None:
            shape, offset = (1, *shape), (expert, *offset)
        cut.append(Piece(name, offset, shape, whole, stored, start, stored.dtype))
    return cut


class _Planner(dcp.DefaultSavePlanner):
    """Has DCP write pieces that are read when it asks for them."""

    def __init__(self, pieces: list[Piece]) -> None:
        super().__init__()
        self.pieces = {(piece.name, piece.offset): piece for piece in pieces}
        self.written: Tensor | None = None

    def create_local_plan(self) -> SavePlan:
        items = []
        for piece in self.pieces.values():
            offset = torch.Size(piece.offset)
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=offset, sizes=torch.Size(piece.shape)),
                properties=TensorProperties(dtype=piece.dtype),
                size=torch.Size(piece.whole),
            )
            items.append(WriteItem(MetadataIndex(piece.name, offset), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(
            items, planner_data={piece.name: (piece.name,) for piece in self.pieces.values()}
        )
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        # The writer keeps what it has written until the file is done: a piece's memory is given back under it. It asks
        # for the next one when the last is written, as it copies none ahead.
        if self.written is not None:
            self.written.untyped_storage().resize_(0)
        self.written = self.pieces[write_item.index.fqn, tuple(write_item.index.offset)].read()
        return self.written


def write_checkpoint(path: Path, pieces: list[Piece], state: dict[str, Any]) -> None:
    """A checkpoint of `pieces` as the trainer writes them, one piece in memory at a time. Raises OSError, UserError."""
    path.mkdir(parents=True)
    writer = dcp.FileSystemWriter(path, per_thread_copy_ahead=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save({}, storage_writer=writer, planner=_Planner(pieces), no_dist=True)
        except dcp.api.CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            if isinstance(reason, OSError | UserError):
                raise reason from error
            raise
    write_whole(path / STATE, json.dumps(state, indent=1) + "\n")
    files = {file.name: file_entry(file) for file in sorted(path.iterdir())}
    manifest = {"kind": PERMANENT, "step": state["step"], "torch": torch.__version__, "files": files}
    write_whole(path / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    write_whole(path / COMPLETE, "")


def _write_tokenizer(folder: Path, run: Path) -> str | None:
    """Writes the folder's tokenizer as a data folder without text, and as a run keeps it; returns why it cannot."""
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:
        return f"the tokenizer is left out: {error}"
    data = run / "data"
    data.mkdir()
    meta = {
        "format": 1,
        "fingerprint": f"no text; tokenizer {tokenizer.sha256}",
        "tokenizer": {"kind": tokenizer.kind, "file": tokenizer.save(data), "sha256": tokenizer.sha256},
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "dtype": "uint32",
        "splits": {},
    }
    write_whole(data / "meta.json", json.dumps(meta, indent=1) + "\n")
    # data.path is absolute, and the run may be moved
    keep_tokenizer(run, data / meta["tokenizer"]["file"], fresh=True)
    return None


def _write_run_config(config: ModelConfig, positions: int, run: Path, data: Path | None) -> None:
    sections: dict[str, Any] = {
        "model": config.model_dump(mode="json", exclude_defaults=True),
        "data": {"seq_len": min(positions, LONGEST_WINDOW)} | ({} if data is None else {"path": str(data)}),
        "precision": {"compute": "fp32"},  # eval and generate take a run's values as they are
    }
    text = re.sub(r"^(\w+):$", r"\n\1:", yaml.safe_dump(sections, sort_keys=False), flags=re.MULTILINE)
    head = (
        "# Made by `stepline import`. data.path holds the tokenizer and no text: give the data to train on.\n"
    )
    write_whole(run / "config.yaml", head + text)
