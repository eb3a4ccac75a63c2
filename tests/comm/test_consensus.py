"""Wishes of single ranks, known to all at the same step; a part of a store that belongs to one attempt."""

import itertools
import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from stepline.comm.consensus import Consensus, Wish
from stepline.comm.rendezvous import UnlikeDevices, attempt_store, check_kinds


def decisions(steps: int) -> list[Wish]:
    """Rank 1 wishes for a stop (15) at step 3, rank 2 for a save at steps 1 and 3, rank 0 has damaged data at 4."""
    consensus, rank, seen = Consensus(dist.new_group(backend="gloo")), dist.get_rank(), []
    for step in range(steps):
        stop, save = 15 * (rank == 1 and step == 3), rank == 2 and step in (1, 3)
        consensus.begin(Wish(rank == 0 and step == 4, stop, save))
        seen.append(consensus.result())
    seen.append(consensus.settle(Wish(stop=rank)))
    return seen


def test_all_ranks_see_the_most_urgent_wish_at_the_same_step(pool):
    save, stop, damaged = Wish(save=True), Wish(stop=15), Wish(damaged=True)
    assert pool.run(3, decisions, 5) == [[Wish(), save, Wish(), stop, damaged, Wish(stop=2)]] * 3


def test_an_urgency_is_of_one_wish_and_in_their_order():
    wishes = [Wish(*w) for w in itertools.product((False, True), range(65), (False, True))]
    assert [Wish.of(wish.urgency()) for wish in wishes] == wishes
    assert sorted(wishes, key=Wish.urgency) == wishes


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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_an_attempt_reads_nothing_of_an_earlier_one(pool):
    whole = [[f"{number}.{rank}" for rank in range(3)] for number in (0, 1)]
    assert pool.run(3, attempts, free_port()) == [[*whole, ["2.0", "2.1"]], [*whole, ["2.0", "2.1"]], whole]


def told(port: int, kinds: list[str]) -> str | None:
    rank = dist.get_rank()
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    dist.barrier()
    try:
        check_kinds(store, len(kinds), kinds[rank], timedelta(seconds=20))
    except UnlikeDevices as error:
        return str(error)
    finally:
        dist.barrier()
    return None


@pytest.mark.parametrize(
    ("kinds", "without"),
    [("cuda cpu cuda", 1), ("cpu cpu cuda", 2), ("cuda cuda cuda", 0), ("cpu cpu cpu", 0)],
)
def test_ranks_without_a_gpu_beside_ranks_with_one(pool, kinds, without):
    """Before NCCL, which would wait for them."""
    says = f"{without} of 3 ranks have no usable GPU (on {socket.gethostname()})" if without else None
    assert pool.run(3, told, free_port(), kinds.split()) == [says] * 3
