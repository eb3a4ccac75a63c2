"""Ranks meet where no launcher keeps a store for them, as under srun: rank 0 opens it."""

import os
import socket

import pytest
import torch
import torch.distributed as dist

from stepline.comm.mesh import World, build_mesh, limit_groups, start_process_group
from stepline.comm.probe import Meeting


def without_a_launcher(ports: list[int]) -> tuple[float, list[str]]:
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE")
    world = World.from_environment()
    os.environ["MASTER_PORT"] = str(ports[0])
    gathered = Meeting.join(world, 60).gather("name", f"rank {world.rank}")
    os.environ["MASTER_PORT"] = str(ports[1])
    start_process_group(world, torch.device("cpu"), 60)
    total = torch.tensor(world.rank + 1.0)
    dist.all_reduce(total)
    return total.item(), gathered


def test_rank_0_opens_the_store(pool):
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1], two.getsockname()[1]]
    answers = pool.run(3, without_a_launcher, ports, init=False)
    assert [total for total, _ in answers] == [6.0] * 3
    assert answers[0][1] == ["rank 0", "rank 1", "rank 2"]


def alone_in_a_collective() -> str:
    """Rank 0's error, while rank 1 is there but does not come."""
    groups, store = build_mesh(torch.device("cpu"), 2, 2), dist.distributed_c10d._get_default_store()
    limit_groups(1.0, dist.new_group())
    said = ""
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError) as error:
            dist.all_reduce(torch.ones(()), group=groups["shard"].get_group())
        said = str(error.value)
        store.set("over", "yes")
    store.wait(["over"])
    return said


def test_groups_of_a_mesh_have_the_limit_that_is_set(pool):
    """By itself torch would let them wait for half an hour."""
    assert "Timed out waiting" in pool.run(2, alone_in_a_collective)[0]
