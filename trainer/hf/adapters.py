"""Pre-trained layers in reversible blocks with adapters, trained in two stages (RevFFN, arXiv 2512.20920): the adapters
alone, then everything.

In the first stage a checkpoint holds what is trained and no more; the frozen rest stays where it was read from, in the
checkpoint that `run.init_from` names.
"""

import logging
import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from stepline.comm.fsdp import local, shard_slice
from stepline.models.canon import is_canon
from stepline.models.transformer import Transformer
from stepline.trainer.config import Config
from stepline.trainer.config_io import read_run_config
from stepline.trainer.errors import UserError
from stepline.trainer.run.manifest import COMPLETE, find_checkpoint, run_of
from stepline.trainer.run.stored import load_tensors, stored_names

log = logging.getLogger("stepline")

ADAPTER = re.compile(r"layers\.(\d+)\.(attn|ffn)_(up|down)\.weight")
STREAM_NORM = re.compile(r"layers\.(\d+)\.(attn|attn_kv|ffn)_norm\.weight")


def is_new(name: str) -> bool:
    """Whether pre-trained layers do not bring this parameter: an adapter, or a norm or Canon layer of a stream."""
    return is_canon(name) or any(pattern.fullmatch(name) for pattern in (ADAPTER, STREAM_NORM))


def check_adapters(config: Config) -> None:
    """Raises UserError where adapters alone are to be trained and there are none, or nothing to read the rest from.

    That must be a checkpoint: of a run the newest one may be another the next time.
    """
    if config.optimizer.only != "adapters":
        return
    if config.model.blocks != "revffn" or not config.model.revffn.adapters:
        raise UserError("optimizer.only=adapters needs model.blocks=revffn and model.revffn.adapters=true")
    path = config.run.init_from
    if path is not None and not path.exists():
        raise UserError(
            f"what this run leaves frozen lies in {path} (its run.init_from), which is not there; put it back"
        )
    if path is None or not (path / COMPLETE).is_file():
        found = "" if path is None else f", such as {find_checkpoint(path, checksums=False)}"
        raise UserError(
            "optimizer.only=adapters reads what is frozen from run.init_from at every start: name a checkpoint "
            f"there{found}"
        )


def freeze(model: nn.Module) -> None:
    """Leaves the adapters and the norms of the streams alone trainable."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_new(name))


def load_frozen(model: nn.Module, config: Config) -> None:
    """Fills what is frozen, at the start of every attempt, from the checkpoint that run.init_from names, whose files
    have been read and found sound."""
    path = find_checkpoint(config.run.init_from, checksums=False)
    frozen = {f"model.{name}": p.data for name, p in model.named_parameters() if not p.requires_grad}
    for checkpoint, names in holders(path, frozen, checksums=False).items():
        load_tensors(checkpoint, {name: frozen[name] for name in names})


def holders(checkpoint: Path, names: Collection[str], *, checksums: bool = True) -> dict[Path, list[str]]:
    """Which checkpoint holds which of these tensors: this one, or those that runs of adapters alone started from.

    What none holds is left to the last one, so that reading it says what is missing. checksums: whether the files of
    the others are read and compared.
    """
    found: dict[Path, list[str]] = {}
    rest = list(names)
    while rest:
        known = stored_names(checkpoint)
        found[checkpoint] = [name for name in rest if name in known]
        rest = [name for name in rest if name not in known]
        if not rest:
            break
        if (base := base_of(checkpoint)) is None:
            found[checkpoint] += rest
            break
        checkpoint = find_checkpoint(base, checksums=checksums)
    return {path: part for path, part in found.items() if part}


def base_of(checkpoint: Path) -> Path | None:
    """What the run of a checkpoint started from, where it has trained adapters alone and so holds no other weights."""
    run = run_of(checkpoint)
    config = read_run_config(run) if (run / "config.yaml").is_file() else None
    return config.run.init_from if config is not None and config.optimizer.only == "adapters" else None


def initial_checkpoints(path: Path | None) -> list[Path]:
    """The checkpoint that run.init_from names, and those which hold what it does not."""
    found = []
    while path is not None:
        found.append(find_checkpoint(path, checksums=False))
        path = base_of(found[-1])
    return found


def pretrained(model: Transformer, checkpoint: Path) -> bool:
    """Whether the model has adapters and `checkpoint`, of standard blocks, has not."""
    shape = model.config
    if shape.blocks != "revffn" or not shape.revffn.adapters:
        return False
    known = stored_names(checkpoint)
    return "model.layers.0.attn_norm.weight" in known and not any("_up.weight" in name for name in known)


@torch.no_grad()
def start_adapters(model: Transformer, checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Fills `tensors` of the model from a checkpoint of standard blocks of the full width.

    Attention, feed-forward layers, embedding, last norm and head are taken over. The norms of the streams start at 1,
    their Canon layers at 0.
    The adapters start so that a layer reads and writes what it knows: `up` repeats the stream in both halves and scales
    by the pre-trained norm's weight, which the layer was trained behind, and `down` takes the half of the layer's
    result that belongs to the stream it writes to, so that each stream stays that half of the pre-trained residual.
    Of a model trained to a loss of 3.69 this start has one of 7.2, which 100 steps of the adapters bring to 4.66;
    random adapters have 8.4 and 4.91.
    """
    new = {name: tensor for name, tensor in tensors.items() if is_new(name.removeprefix("model."))}
    width = model.config.hidden_size
    gains = {
        f"model.layers.{i}.{half}_norm.weight": torch.empty(width)
        for i in range(model.config.num_layers)
        for half in ("attn", "ffn")
    }
    load_tensors(checkpoint, {name: t for name, t in tensors.items() if name not in new} | gains)
    for name, tensor in new.items():
        match = ADAPTER.fullmatch(name.removeprefix("model."))
        if match is None:
            local(tensor).fill_(0.0 if is_canon(name) else 1.0)
            continue
        layer, half, way = match.groups()
        gain = gains[f"model.layers.{layer}.{half}_norm.weight"]
        fill_adapter(tensor, gain if way == "up" else None, written=0 if half == "attn" else 1)
    log.warning(
        "%s has standard blocks: %d adapters and norms of streams were not loaded (%s …) and start anew, the adapters "
        "from the norms' weights", checkpoint, len(new), min(new).removeprefix("model."),
    )  # fmt: skip


def fill_adapter(adapter: Tensor, gain: Tensor | None, written: int) -> None:
    """Sets this rank's part of an adapter.

    adapter: `[hidden, hidden / 2]` upwards, `[hidden / 2, hidden]` downwards, whole or sharded. gain: `[hidden]`, of an
    adapter upwards. written: of one downwards, the half of the hidden width that it passes on.
    """
    part = local(adapter)
    (rows, columns), (row, column) = shard_slice(adapter)
    i = torch.arange(row, row + rows, device=part.device).unsqueeze(1)
    j = torch.arange(column, column + columns, device=part.device)
    if gain is not None:
        part.copy_((i % adapter.shape[1] == j) * gain.to(part.device)[row : row + rows].unsqueeze(1))
    else:
        part.copy_(i + written * adapter.shape[0] == j)
