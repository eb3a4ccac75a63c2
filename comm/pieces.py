"""Tensors cut flat: each rank holds an interval of the flattened values, as DeepSpeed's ZeRO deals them.

No placement of a DTensor says that; as boxes, the intervals are ordinary parts of a checkpoint, which any other layout
of ranks reads.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from stepline.comm.fsdp import local, shard_slice

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(first index, extent) in each dimension."""


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The values `start` to `stop` of a flattened tensor as boxes, in their order: at most 2 dimensions - 1 of them."""
    if start >= stop:
        return []
    if not shape:
        return [((), ())]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        return _in_row(shape, last, start - last * row, stop - last * row)
    before = _in_row(shape, first - 1, start - (first - 1) * row, row) if start < first * row else []
    after = _in_row(shape, last, 0, stop - last * row) if last * row < stop else []
    rows = [((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]))] if first < last else []
    return before + rows + after


def _in_row(shape: Sequence[int], index: int, start: int, stop: int) -> list[Box]:
    return [((index, *offset), (1, *size)) for offset, size in boxes(shape[1:], start, stop)]


class Pieces(Tensor):
    """This rank's interval of a tensor of `shape`, which begins at value `start`; shares storage with `values`.

    A checkpoint saves and loads it in place, box by box (the protocol of torch.distributed.checkpoint); nothing else
    can be done with it.
    """

    __slots__ = ["offsets", "values"]
    offsets: list[tuple[int, ...]]
    values: list[Tensor]

    @staticmethod
    def __new__(cls, values: Tensor, shape: Sequence[int], start: int) -> "Pieces":
        """values: `[length]`, contiguous; empty where this rank has no part."""
        self = cls._empty(shape, values)
        cut = boxes(shape, start, start + values.numel())
        ends = list(itertools.accumulate((math.prod(size) for _, size in cut), initial=0))
        self.offsets = [offset for offset, _ in cut]
        self.values = [
            values[begin:end].view(size) for (begin, end), (_, size) in zip(itertools.pairwise(ends), cut)
        ]
        return self

    @classmethod
    def _empty(cls, shape: Sequence[int], like: Tensor) -> "Pieces":
        self = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=like.dtype, device=like.device)
        self.offsets, self.values = [], []
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.new_empty.default:  # what the stager of checkpoints makes its copy of
            return cls._empty(args[0].shape, torch.empty(0, dtype=args[0].dtype))
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise TypeError(f"{function}: pieces of a tensor can only be saved and loaded; use their `values`")

    def __repr__(self) -> str:
        return f"Pieces({tuple(self.shape)}, at {self.offsets})"

    def __create_write_items__(self, name: str, _object: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets, i),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(values),
                    size=self.size(),
                ),
            )
            for i, (chunk, values) in enumerate(zip(self.__create_chunk_list__(), self.values, strict=True))
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offset), sizes=values.size())
            for offset, values in zip(self.offsets, self.values, strict=True)
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.values[self.offsets.index(tuple(index.offset))]


def parts(tensor: Tensor) -> list[tuple[Tensor, tuple[int, ...]]]:
    """What this rank holds of a tensor, however it is sharded: (values, their first index) of each box."""
    if isinstance(tensor, Pieces):
        return list(zip(tensor.values, tensor.offsets, strict=True))
    return [(local(tensor), shard_slice(tensor)[1])]
