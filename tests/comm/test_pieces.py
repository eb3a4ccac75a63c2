"""Flat intervals of tensors as boxes, against indices written out; through a checkpoint into other layouts."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from stepline.comm.pieces import Pieces, boxes, parts


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4), (1, 5), (4, 1, 2)])
def test_every_interval_is_boxes_in_order(shape):
    size = math.prod(shape)
    values = torch.arange(size).view(shape)
    for start in range(size + 1):
        for stop in range(start, size + 1):
            found = boxes(shape, start, stop)
            assert len(found) <= 2 * len(shape) - 1
            flat = [
                values[tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))].flatten()
                for offset, extent in found
            ]
            assert torch.cat([torch.empty(0, dtype=torch.int64), *flat]).tolist() == list(range(start, stop))


def test_parts_share_storage():
    flat = torch.zeros(10)
    pieces = Pieces(flat[2:9], (4, 5), 3)
    for part, (row, column) in parts(pieces):
        rows = torch.arange(row, row + part.shape[0]).unsqueeze(1)
        part.copy_(rows * 5 + torch.arange(column, column + part.shape[1]))
    assert flat.tolist() == [0, 0, 3, 4, 5, 6, 7, 8, 9, 0]
    assert pieces.shape == (4, 5)
    assert pieces.numel() * pieces.element_size() == 80


SHAPES = {"a": (5, 3), "b": (7,), "c": (3, 2, 4)}


def cut(world: int, rank: int, shape: tuple[int, ...], fill: bool) -> Pieces:
    """Uneven intervals, the last ranks' empty."""
    whole = torch.arange(math.prod(shape)).float()
    size = -(-len(whole) // 2) + 1
    start, stop = min(rank * size, len(whole)), min((rank + 1) * size, len(whole))
    values = whole[start:stop] if fill else torch.zeros(stop - start)
    return Pieces(values, shape, start)


def save_and_load(folder: str) -> bool:
    rank, world = dist.get_rank(), dist.get_world_size()
    state = {name: cut(world, rank, shape, fill=True) for name, shape in SHAPES.items()}
    staged = DefaultStager(StagingOptions(False, False, False, False)).stage(state)
    for pieces in state.values():
        for part, _ in parts(pieces):
            part.fill_(-1)  # what was staged is a copy
    dcp.save(staged, checkpoint_id=f"{folder}/flat")
    mesh = init_device_mesh("cpu", (world,))
    whole = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    sharded = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in whole.items()}
    dcp.load(sharded, checkpoint_id=f"{folder}/flat")
    right = all(
        torch.equal(t.full_tensor(), torch.arange(t.numel()).float().view(t.shape)) for t in sharded.values()
    )
    dcp.save(sharded, checkpoint_id=f"{folder}/rows")
    again = {name: cut(world, rank, shape, fill=False) for name, shape in SHAPES.items()}
    dcp.load(again, checkpoint_id=f"{folder}/rows")
    for name, pieces in again.items():
        mine = torch.cat([torch.empty(0), *(part.flatten() for part, _ in parts(pieces))])
        wanted = torch.cat(
            [torch.empty(0), *(p.flatten() for p, _ in parts(cut(world, rank, SHAPES[name], True)))]
        )
        right &= torch.equal(mine, wanted)
    assert isinstance(sharded["a"], DTensor)
    return right


@pytest.mark.parametrize("world", [2, 3])
def test_a_checkpoint_of_pieces_is_one_of_whole_tensors(pool, tmp_path, world):
    assert pool.run(world, save_and_load, str(tmp_path)) == [True] * world
