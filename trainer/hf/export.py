"""A run as a folder that `transformers` loads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepline.kernels.sparse24 import soft_threshold
from stepline.models.hf import hf_config_dict, stock_family, to_hf_names
from stepline.models.sparse_linear import convert
from stepline.models.transformer import Transformer
from stepline.trainer.config import Config
from stepline.trainer.config_io import read_run_config
from stepline.trainer.errors import UserError
from stepline.trainer.files import new_folder, write_whole
from stepline.trainer.hf.adapters import holders
from stepline.trainer.hf.blocks import BLOCK_BYTES, StoredTensors
from stepline.trainer.hf.card import model_card
from stepline.trainer.hf.custom import custom_config_dict, custom_name, write_code
from stepline.trainer.hf.shards import INDEX, Unit, deal, open_shard
from stepline.trainer.hf.tokenizer import write_tokenizer
from stepline.trainer.run.build import recipes
from stepline.trainer.run.infer import run_tokenizer
from stepline.trainer.run.manifest import find_checkpoint, read_state, run_of
from stepline.trainer.run.sparsity import Sparsity
from stepline.trainer.run.state import model_tensors
from stepline.trainer.run.stored import load_tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BIAS = ".balance_bias"
KIND = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass
class Exported:
    """What was written."""

    folder: Path
    architecture: str
    remote_code: bool
    """Whether the folder needs `trust_remote_code`."""
    shards: int
    bytes: int
    notes: list[str]
    """What could not be written, one sentence each."""


def export_run(path: Path, output: Path, dtype: str = "fp32", shard_bytes: int = 5 * 10**9) -> Exported:
    """Writes the newest checkpoint of a run, or one of its checkpoints, into the new folder `output`.

    One parameter at a time is in memory, its place in the file and a block of its rows. dtype: fp32, the weights
    bit for bit, or bf16, rounded to nearest. Raises UserError.
    """
    checkpoint = find_checkpoint(path)
    run = run_of(checkpoint)
    config, state = read_run_config(run), read_state(checkpoint)
    with new_folder(output) as partial:
        exported = _write(checkpoint, run, config, state, partial, DTYPES[dtype], shard_bytes)
    exported.folder = output
    return exported


def _write(
    checkpoint: Path,
    run: Path,
    config: Config,
    state: dict[str, Any],
    folder: Path,
    dtype: torch.dtype,
    limit: int,
) -> Exported:
    with torch.device("meta"):
        model = Transformer(config.model)
    shapes = {name.removeprefix("model."): tuple(t.shape) for name, t in model_tensors(model).items()}
    positions = state.get("max_positions", config.data.seq_len)
    family = _stock(checkpoint, config, shapes)
    if family is None:
        raw = custom_config_dict(config.model, positions)
        write_code(folder)
    else:
        raw = hf_config_dict(config.model, positions)
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(BIAS)}
    architecture = raw["architectures"][0]
    units = []
    for name, shape in shapes.items():
        names = [custom_name(name)] if family is None else to_hf_names(name, config.model.moe.experts, family)
        # what moves a choice between experts is not rounded
        units.append(Unit(name, tuple(names), shape, torch.float32 if name.endswith(BIAS) else dtype))
    shards, total = write_weights(checkpoint, units, folder, limit, betas(checkpoint, config, state["step"]))
    eod_id, begins, notes = _write_tokenizer(config, state, folder)
    raw |= {"torch_dtype": KIND[dtype]}
    if eod_id is not None:
        ends = {"bos_token_id": begins, "eos_token_id": eod_id}
        raw |= ends
        _write_json(folder / "generation_config.json", ends)
    _write_json(folder / "config.json", raw)
    card = model_card(run, config, state, kind=architecture, remote=family is None, begin_id=begins)
    write_whole(folder / "README.md", card)
    return Exported(folder, architecture, family is None, shards, total, notes)


def _stock(checkpoint: Path, config: Config, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """The stock family that computes the same; None where there is none."""
    try:
        family = stock_family(config.model)
    except ValueError:
        return None
    biases = {f"model.{name}": torch.empty(s) for name, s in shapes.items() if name.endswith(BIAS)}
    if biases:
        load_tensors(checkpoint, biases)
    return None if any(bias.any() for bias in biases.values()) else family


def betas(checkpoint: Path, config: Config, step: int) -> dict[str, Tensor]:
    """The scale of each weight that a forward after `step` steps makes 2:4 sparse, 0-dim by the weight's name."""
    with torch.device("meta"):
        model = Transformer(config.model)
        convert(model, *recipes(config))
    sparsity = Sparsity(config, model)
    sparsity.enter_phase(step - 1)
    if not sparsity.weights or not sparsity.mode.sparse:
        return {}
    scales = {name: torch.zeros(()) for name, _, _ in sparsity.weights}
    stored = {
        name: name.removesuffix(".weight") + (".beta" if name.endswith(".weight") else "_beta")
        for name in scales
    }
    load_tensors(checkpoint, {f"model.{stored[name]}": scale for name, scale in scales.items()})
    return scales


def write_weights(
    checkpoint: Path, units: list[Unit], folder: Path, limit: int, scales: dict[str, Tensor]
) -> tuple[int, int]:
    """Streams parameters of a checkpoint into shards of at most `limit` bytes; returns their number and bytes.

    scales: of `betas`; these weights are written as the forward uses them, half of their values zeros. Raises UserError
    where the checkpoint is damaged or does not fit, OSError on a full disk.
    """
    shards = deal(units, limit)
    several = len(shards) > 1
    weight_map, total = {}, 0
    names = [f"model.{unit.source}" for unit in units]
    held_by = {name: holder for holder, part in holders(checkpoint, names).items() for name in part}
    stored = {holder: StoredTensors(holder) for holder in set(held_by.values())}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if several else "model.safetensors"
        with open_shard(folder / file, shard) as places:
            for unit, place in places:
                _fill(place, stored[held_by[f"model.{unit.source}"]], unit, scales.get(unit.source))
                del place
        weight_map |= {name: file for unit in shard for name in unit.names}
        total += sum(unit.nbytes for unit in shard)
    if several:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return len(shards), total


def _fill(place: Tensor, stored: StoredTensors, unit: Unit, beta: Tensor | None) -> None:
    """Block by block, cast on the way; a block is small beside the unit."""
    for part, block in stored.blocks(f"model.{unit.source}", unit.shape, min(BLOCK_BYTES, unit.nbytes // 8)):
        place[part] = block if beta is None else soft_threshold(block) * beta


def _write_tokenizer(
    config: Config, state: dict[str, Any], folder: Path
) -> tuple[int | None, int | None, list[str]]:
    """Ids that end documents and begin texts, and what was not written."""
    try:
        tokenizer = run_tokenizer(config)
    except UserError as error:
        return None, None, [f"the tokenizer is left out: {error}"]
    trained, begins = state["step"] > 0, state.get("bos_token_id")
    if not isinstance(begins, int) or not 0 <= begins < tokenizer.vocab_size:
        begins = None
    note = write_tokenizer(tokenizer, folder, trained, begins)
    if trained or begins is None:
        begins = tokenizer.eod_id
    return tokenizer.eod_id, begins, [note] if note else []


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")
