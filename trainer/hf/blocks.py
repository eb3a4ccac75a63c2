"""Tensors of a checkpoint a block of rows at a time, where torch.distributed.checkpoint (DCP) reads whole stored parts.

DCP stores each part by `torch.save`, a zip archive in which the values stand as they are under `.../data/0`.
"""

import io
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from stepline.trainer.errors import UserError
from stepline.trainer.hf.shards import filled
from stepline.trainer.run.manifest import damaged, not_read
from stepline.trainer.run.stored import stored_metadata

BLOCK_BYTES = 64 * 2**20

Place = tuple[slice, ...]


class _Window(io.RawIOBase):
    """Some bytes of an open file as a file of their own."""

    def __init__(self, file: BinaryIO, begin: int, length: int) -> None:
        self.file, self.begin, self.length, self.at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: memoryview) -> int:
        self.file.seek(self.begin + self.at)
        got = self.file.readinto(memoryview(buffer)[: max(self.length - self.at, 0)])
        self.at += got
        return got


class StoredTensors:
    """The tensors of one checkpoint; raises UserError where it is damaged or cannot be read now."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.metadata: Metadata = stored_metadata(checkpoint)

    def blocks(
        self, name: str, shape: tuple[int, ...], most: int = BLOCK_BYTES
    ) -> Iterator[tuple[Place, Tensor]]:
        """All values of `name`, of `shape`, as blocks of rows of at most `most` bytes (one row at least), with their
        places. Raises UserError, too where the checkpoint holds another shape."""
        entry = self.metadata.state_dict_metadata.get(name)
        if entry is None or tuple(entry.size) != shape:
            held = "no such weight" if entry is None else f"{tuple(entry.size)}"
            raise UserError(
                f"the weights in {self.checkpoint} do not fit this model: {name} is {shape}, it has {held}"
            )
        for part in entry.chunks:
            offsets, sizes = tuple(part.offsets), tuple(part.sizes)
            if not math.prod(sizes):
                continue
            where = self.metadata.storage_data[MetadataIndex(name, part.offsets)]
            try:
                with (
                    (self.checkpoint / where.relative_path).open("rb") as file,
                    zipfile.ZipFile(io.BufferedReader(_Window(file, where.offset, where.length))) as archive,
                ):
                    yield from _rows(archive, offsets, sizes, entry.properties.dtype, most)
            except OSError as error:
                raise not_read(self.checkpoint, where.relative_path, error) from error
            except (zipfile.BadZipFile, EOFError) as error:
                raise damaged(self.checkpoint, f"{name} cannot be read") from error


def _rows(
    archive: zipfile.ZipFile, offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype, most: int
) -> Iterator[tuple[Place, Tensor]]:
    values = next((item for item in archive.infolist() if item.filename.endswith("/data/0")), None)
    if values is None or values.file_size != math.prod(sizes) * dtype.itemsize:
        raise EOFError("not the values of this part")
    rest = tuple(slice(o, o + n) for o, n in zip(offsets[1:], sizes[1:], strict=True))
    rows = sizes[0] if sizes else 1
    step = max(1, most // (values.file_size // rows))
    with archive.open(values) as stream:
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            block = torch.empty((stop - start, *sizes[1:]) if sizes else (), dtype=dtype)
            if not filled(block, stream):
                raise EOFError("cut off")
            first = (slice(offsets[0] + start, offsets[0] + stop),) if sizes else ()
            yield (*first, *rest), block
