"""safetensors files, read and written a piece at a time.

A file is an 8-byte little-endian length, as many bytes of JSON that give each tensor's type, shape and place, and the
values without gaps. Nothing in it can be code. https://huggingface.co/docs/safetensors
"""

import ctypes
import json
import math
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from stepline.trainer.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000
"""Bytes; what the safetensors library accepts."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    begin: int
    """First byte in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the first dimension, in memory of their own; raises UserError."""
        part = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        if part.numel() == 0:
            return part
        row = part.nbytes // (stop - start)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.begin + start * row)
            if not filled(part, file):
                raise UserError(f"{self.file} is cut off; download it again")
        return part


def filled(tensor: Tensor, file: IO[bytes]) -> bool:
    """Fills a contiguous tensor with the next bytes of a file; False where there are too few."""
    # not by way of numpy, after which a tensor's memory cannot be given back before the tensor is
    target = memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
    done = 0
    while done < len(target):
        got = file.readinto(target[done:])
        if not got:
            return False
        done += got
    return True


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name; raises UserError where it is none, or is cut off."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(HEADER_LIMIT, size - 8):
                raise ValueError("it is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name} is of type {entry['dtype']}")
            begin, end = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            if any(n < 0 for n in shape) or end - begin != math.prod(shape) * dtype.itemsize or begin < 0:
                raise ValueError(f"the place of {name} does not fit its shape")
            if 8 + length + end > size:
                raise ValueError("it is cut off")
            found[name] = Stored(path, 8 + length + begin, shape, dtype)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); download it again") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no readable safetensors file ({error}); download it again") from error
    return found


def read_folder(folder: Path) -> dict[str, Stored]:
    """The tensors of a model's folder, in the order of its files; raises UserError.

    Only safetensors files are looked at: a pickled `pytorch_model.bin` may hold code.
    """
    index = folder / INDEX
    if not index.is_file():
        if (folder / "model.safetensors").is_file():
            return read_header(folder / "model.safetensors")
        pickled = any(folder.glob("pytorch_model*.bin"))
        raise UserError(
            f"{folder} has no safetensors files"
            + (
                ", and pickled ones may hold code; load and save the model once with transformers"
                if pickled
                else "; give a model's folder"
            )
        )
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
        outside = [name for name in files if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} cannot be read; download it again") from error
    missing = [name for name in files if not (folder / name).is_file()]
    if missing or outside:
        raise UserError(
            f"{folder} lacks {(missing or outside)[0]}, which its index names ({len(missing or outside)} of "
            f"{len(files)} files are missing); download it again"
        )
    tensors = {}
    for name in files:
        tensors |= read_header(folder / name)
    absent = sorted(places.keys() - tensors.keys())
    if absent:
        raise UserError(f"{folder} lacks {absent[0]}, which its index names; download it again")
    return tensors


@dataclass(frozen=True)
class Unit:
    """A parameter, and the tensors of a file that it becomes: itself, or the matrices of a stack."""

    source: str
    """The parameter's name in the checkpoint."""
    names: tuple[str, ...]
    shape: tuple[int, ...]
    """Of the parameter; its first dimension is that of `names` where there are several."""
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def deal(units: list[Unit], limit: int) -> list[list[Unit]]:
    """Units in their order into shards of at most `limit` bytes; a larger unit has a shard of its own."""
    shards: list[list[Unit]] = []
    room = 0
    for unit in units:
        if not shards or unit.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(unit)
        room -= unit.nbytes
    return shards


@contextmanager
def open_shard(path: Path, units: list[Unit]) -> Iterator[Iterator[tuple[Unit, Tensor]]]:
    """Makes a file and yields each unit with its place there, a tensor to be filled.

    The tensors are the file itself, mapped: what fills them decides how much memory a shard takes. Raises OSError on
    a full disk.
    """
    units = sorted(units, key=lambda unit: -unit.dtype.itemsize)  # each value at a multiple of its size
    header, begin = {"__metadata__": {"format": "pt"}}, 0
    for unit in units:
        size = unit.nbytes // len(unit.names)
        for name in unit.names:
            header[name] = {
                "dtype": NAMES[unit.dtype],
                "shape": list(unit.shape if len(unit.names) == 1 else unit.shape[1:]),
                "data_offsets": [begin, begin + size],
            }
            begin += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("w+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        os.posix_fallocate(
            file.fileno(), 0, 8 + len(text) + begin
        )  # a full disk is an error now, no signal later
        yield _places(file.fileno(), 8 + len(text), units)
        os.fsync(file.fileno())


def _places(descriptor: int, at: int, units: list[Unit]) -> Iterator[tuple[Unit, Tensor]]:
    """Each unit's part of a file from byte `at` on, mapped for itself, so that it leaves the memory when it is done."""
    for unit in units:
        offset = at % mmap.ALLOCATIONGRANULARITY
        view = mmap.mmap(descriptor, offset + unit.nbytes, offset=at - offset)
        place = torch.frombuffer(view, dtype=unit.dtype, offset=offset, count=math.prod(unit.shape))
        at += unit.nbytes
        yield unit, place.view(unit.shape)
        del view, place
