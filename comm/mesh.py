"""Process groups and the device mesh (replicate x shard) on which a run's ranks talk."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class World:
    """Who this process is among the ranks; known before any process group exists."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_environment(cls) -> "World":
        """Reads torchrun's variables; one process when there are none."""
        size = int(os.environ.get("WORLD_SIZE", 1))
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            size=size,
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", size)),
        )


def start_process_group(world: World, device: torch.device, timeout_s: float) -> None:
    """Joins the default group: gloo for CPU tensors (checkpoint planning too), NCCL for CUDA tensors.

    A single process without a launcher needs no port. Raises `torch.distributed.DistNetworkError` when the
    rendezvous port is taken, `DistStoreError` when other ranks do not come.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    options = {"timeout": timedelta(seconds=timeout_s)}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options["device_id"] = device
    if world.size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)
    else:
        dist.init_process_group(backend, **options)


def build_mesh(device: torch.device, world_size: int, shard: int) -> DeviceMesh:
    """A 2-D mesh `("replicate", "shard")`; neighbouring ranks, which share the fast links, shard together.

    Raises ValueError when `shard` does not divide the number of ranks.
    """
    if world_size % shard:
        raise ValueError(f"shard {shard} does not divide the {world_size} ranks")
    return init_device_mesh(device.type, (world_size // shard, shard), mesh_dim_names=("replicate", "shard"))
