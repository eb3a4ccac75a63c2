"""Process groups and the device mesh (replicate x shard) on which a run's ranks talk."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from stepline.comm import slurm
from stepline.comm.rendezvous import attempt_store, check_kinds

RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
HOST_S = 1800.0
"""How long the host's own bookkeeping waits at least: one rank may read its share of a file for that much longer."""


@dataclass(frozen=True)
class World:
    """Who this process is among the ranks; known before any process group exists."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_environment(cls) -> "World":
        """Reads torchrun's variables, or srun's; one process when there are none.

        Raises ValueError for what is no rank.
        """
        if slurm.is_rank():
            os.environ.update(slurm.torchrun_variables())
        size = _number("WORLD_SIZE", 1, 1)
        local_size = _number("LOCAL_WORLD_SIZE", size, 1)
        rank, local_rank = _number("RANK", 0), _number("LOCAL_RANK", 0)
        for name, value, total in (("RANK", rank, size), ("LOCAL_RANK", local_rank, local_size)):
            if value >= total:
                raise ValueError(
                    f"the environment's {name} is {value} but there are {total} ranks; start them by torchrun"
                )
        return cls(rank=rank, size=size, local_rank=local_rank, local_size=local_size)


def _number(name: str, default: int, least: int = 0) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise ValueError(
            f"the environment's {name} is {text!r}; it must be a whole number of at least {least}, or unset"
        )
    return int(text)


def check_rendezvous(world: World) -> None:
    """Raises ValueError where the environment does not say at which address and port the ranks meet."""
    missing = [name for name in RENDEZVOUS if name not in os.environ]
    if missing and world.size > 1:
        raise ValueError(
            f"there are {world.size} ranks but the environment has no {missing[0]}; start them by torchrun"
        )
    if not missing and _number("MASTER_PORT", 0) > 65535:
        raise ValueError(f"the environment's MASTER_PORT is {os.environ['MASTER_PORT']}; ports end at 65535")


def start_process_group(world: World, device: torch.device, timeout_s: float) -> None:
    """Joins the default group: gloo for CPU tensors (checkpoint planning too), NCCL for CUDA tensors.

    A single process without a launcher needs no port. Raises `torch.distributed.DistNetworkError` when the
    rendezvous port is taken, `DistStoreError` when other ranks do not come, `UnlikeDevices` when only some have a GPU.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    options = {"timeout": timedelta(seconds=timeout_s)}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if world.size > 1:  # one rank has nobody to connect to at once
            options["device_id"] = device
    store = _store(world, options["timeout"])
    if world.size > 1:
        check_kinds(store, world.size, device.type, options["timeout"])
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, **options)


def _store(world: World, timeout: timedelta) -> dist.Store:
    """Where the ranks of this attempt meet."""
    if world.size == 1 and not all(name in os.environ for name in RENDEZVOUS):
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address, port = (os.environ[name] for name in RENDEZVOUS)
        store = dist.TCPStore(address, int(port), timeout=timeout, wait_for_workers=False)
        return attempt_store(store, world.rank, world.size, timeout)
    store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=timeout))
    store.set_timeout(timeout)
    return dist.PrefixStore("stepline", store)


def limit_groups(timeout_s: float, host: dist.ProcessGroup) -> None:
    """Collectives of the process groups that are there end after `timeout_s`; those of `host`, the bookkeeping's, have
    HOST_S at least. By itself torch gives a mesh's groups 10 minutes on GPUs and 30 on CPUs, whatever the default's is.
    """
    for group in list(distributed_c10d._world.pg_map):
        seconds = max(timeout_s, HOST_S) if group is host else timeout_s
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def patient_group() -> dist.ProcessGroup:
    """All ranks in a group of gloo whose collectives wait for as long as it takes: who uses it ends a hang."""
    group = dist.new_group(backend="gloo")  # in which the ranks meet within the usual time
    distributed_c10d._set_pg_timeout(timedelta(days=365), group)
    return group


def build_mesh(device: torch.device, world_size: int, shard: int) -> DeviceMesh:
    """A 2-D mesh `("replicate", "shard")`; neighbouring ranks, which share the fast links, shard together.

    Raises ValueError when `shard` does not divide the number of ranks.
    """
    if world_size % shard:
        raise ValueError(f"shard {shard} does not divide the {world_size} ranks")
    return init_device_mesh(device.type, (world_size // shard, shard), mesh_dim_names=("replicate", "shard"))
