"""The shared processes: environment, fresh groups, errors with rank, dead and hung workers."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, init_device_mesh


def _identity(offset: torch.Tensor):
    total = offset + dist.get_rank()
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), total


def _own_group():
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    dist.barrier()  # a rank that ended at once would leave before the other has connected
    return dist.get_world_size()


def _mesh_sum(shape: tuple[int, ...], names: tuple[str, ...]):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    rows = DTensor.from_local(torch.ones(2, 3), mesh[names[-1]], [Shard(0)])
    return (rows * 2).sum().full_tensor().item()


def _fails_on(rank: int):
    if dist.get_rank() == rank:
        raise ZeroDivisionError("on purpose")
    dist.barrier()


def _exits():
    os._exit(3)


def _sleeps():
    time.sleep(60)


def test_ranks_environment_and_collectives(pool):
    answers = pool.run(4, _identity, torch.zeros(3))
    assert [a[:3] for a in answers] == [(r, 4, r) for r in range(4)]
    assert all(torch.equal(a[3], torch.full((3,), 6.0)) for a in answers)
    assert "RANK" not in os.environ


def test_the_product_may_initialise(pool):
    assert pool.run(2, _own_group, init=False) == [2, 2]


def test_meshes_of_successive_jobs_do_not_mix(pool):
    for shape, names, total in [((2, 2), ("r", "s"), 24), ((4,), ("s",), 48), ((2, 2), ("r", "s"), 24)]:
        assert pool.run(4, _mesh_sum, shape, names) == [total] * 4
    assert pool.run(2, _mesh_sum, (2,), ("s",)) == [24, 24]


def _changes_settings():
    os.environ["LEFT_BEHIND"] = "1"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)


def _settings():
    return "LEFT_BEHIND" in os.environ, os.getcwd(), torch.get_default_dtype()


def test_a_job_leaves_nothing_to_the_next(pool):
    pool.run(1, _changes_settings)
    assert pool.run(1, _settings) == [(False, os.getcwd(), torch.float32)]


def test_failures_name_the_rank(pool):
    with pytest.raises(AssertionError, match=r"rank 1 of 2: (.|\n)*ZeroDivisionError: on purpose"):
        pool.run(2, _fails_on, 1, timeout=20)
    assert pool.run(2, _own_group, init=False) == [2, 2]


def test_dead_and_hung_workers_are_replaced(pool):
    own = type(pool)()  # of its own, so that the others need not start again
    with pytest.raises(AssertionError, match="rank 0 of 1: the process died"):
        own.run(1, _exits)
    with pytest.raises(AssertionError, match="did not finish within 4 s"):
        own.run(1, _sleeps, timeout=4)
    own.close()
