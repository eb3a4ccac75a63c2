"""Wishes of single ranks, known to all at the same step; a part of a store that belongs to one attempt."""

import socket
from datetime import timedelta

import torch.distributed as dist

from stepline.comm.consensus import Consensus
from stepline.comm.rendezvous import attempt_store


def decisions(steps: int) -> list[list[int]]:
    """Rank 1 wishes for a stop (15) at step 3, rank 2 for a save at steps 1 and 3."""
    consensus, rank, seen = Consensus(dist.new_group(backend="gloo"), size=2), dist.get_rank(), []
    for step in range(steps):
        consensus.begin([15 * (rank == 1 and step == 3), int(rank == 2 and step in (1, 3))])
        seen.append(consensus.result())
    seen.append(consensus.settle([rank, 0]))
    return seen


def test_all_ranks_see_the_largest_wish_at_the_same_step(pool):
    expected = [[0, 0], [0, 1], [0, 0], [15, 1], [0, 0], [2, 0]]
    assert pool.run(3, decisions, 5) == [expected] * 3


def attempts(port: int) -> list[list[str]]:
    """Three attempts on one store, the last with fewer ranks; each leaves a value of every rank behind."""
    rank, seen = dist.get_rank(), []
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    dist.barrier()
    for number, size in enumerate((3, 3, 2)):
        if rank < size:
            part = attempt_store(store, rank, size, timedelta(seconds=20))
            part.set(f"address/{rank}", f"{number}.{rank}")
            seen.append([part.get(f"address/{other}").decode() for other in range(size)])
        dist.barrier()
    return seen


def test_an_attempt_reads_nothing_of_an_earlier_one(pool):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    whole = [[f"{number}.{rank}" for rank in range(3)] for number in (0, 1)]
    assert pool.run(3, attempts, port) == [[*whole, ["2.0", "2.1"]], [*whole, ["2.0", "2.1"]], whole]
