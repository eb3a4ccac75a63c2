"""Whether ranks can talk, and how fast: a meeting that needs no backend, and the rates of an all-reduce."""

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from stepline.comm.mesh import World


@dataclass
class Meeting:
    """Ranks that exchange small values through the rendezvous store, also where no backend works."""

    store: dist.Store
    rank: int
    size: int
    timeout_s: float
    """How long one rank waits for another."""
    lost: set[int] = field(default_factory=set)
    """Ranks that rank 0 has waited for in vain; it does not wait for them again."""

    @classmethod
    def join(cls, world: World, timeout_s: float) -> "Meeting":
        """Meets at MASTER_ADDR:MASTER_PORT; the launcher holds the store, or rank 0 where none does.

        Raises `torch.distributed.DistError` where the address cannot be used or rank 0 does not come.
        """
        timeout = timedelta(seconds=timeout_s)
        if world.size == 1:
            return cls(dist.HashStore(), 0, 1, timeout_s)
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=timeout,
            wait_for_workers=False,  # who is missing is what one wants to know
        )
        # An agent that starts its ranks again keeps the store of the first attempt.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(dist.PrefixStore(f"probe-{attempt}", store), world.rank, world.size, timeout_s)

    def gather(self, key: str, value: Any) -> list[Any]:
        """The ranks' values (plain JSON, not null) by rank, None of those that did not come in time; empty but on
        rank 0."""
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        if self.rank != 0:
            return []
        deadline, values = time.monotonic() + self.timeout_s, []
        for rank in range(self.size):
            seconds = 0 if rank in self.lost else deadline - time.monotonic()
            values.append(self._get(f"{key}/{rank}", seconds))
            if values[-1] is None:
                self.lost.add(rank)
        return values

    def tell(self, key: str, value: Any = None) -> Any:
        """Rank 0's value on every rank; None where it did not come in time."""
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
            return value
        # Rank 0 may have waited that long for another rank.
        return self._get(key, 2 * self.timeout_s + 1)

    def _get(self, key: str, seconds: float) -> Any:
        try:
            self.store.wait([key], timedelta(seconds=max(seconds, 0.01)))
            return json.loads(self.store.get(key))
        except dist.DistError:
            return None

    def clock_skew(self, rounds: int = 3) -> float | None:
        """Seconds that this rank's clock is ahead of rank 0's, to the store's latency (some ms)."""
        ahead = []
        for i in range(rounds):
            self.gather(f"ready-{i}", True)
            told = self.tell(f"clock-{i}", time.time())
            if told is None:
                return None
            ahead.append(time.time() - told)
        return min(ahead) if self.rank else 0.0  # what is heard late looks ahead

    @contextlib.contextmanager
    def process_group(self, backend: str, device: torch.device) -> Iterator[None]:
        """The default group on `backend` while inside; raises whatever the backend raises."""
        options = {}
        if device.type == "cuda" and backend == "nccl":
            torch.cuda.set_device(device)
            options["device_id"] = device
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(backend, self.store),
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=self.timeout_s),
            **options,
        )
        try:
            yield
        finally:
            dist.destroy_process_group()


@dataclass(frozen=True)
class Rates:
    """What all-reduces took."""

    bytes: int
    """Size of the large one."""
    seconds: float
    """Median of the large one."""
    latency_s: float
    """Median of one that holds a single number."""
    exact: bool
    """Whether the sum was right on this rank."""
    ranks: int

    @property
    def bus_bytes_per_s(self) -> float:
        """2 (n - 1) / n x bytes / seconds: what each rank's link carries, comparable between numbers of ranks."""
        return 2 * (self.ranks - 1) / self.ranks * self.bytes / self.seconds


def all_reduce_rates(device: torch.device, num_bytes: int, repeats: int = 5) -> Rates:
    """Times fp32 all-reduces in the default group and checks the sum of a large one."""
    rank, size = dist.get_rank(), dist.get_world_size()
    large = torch.full((num_bytes // 4,), float(rank + 1), device=device)
    small = torch.zeros(1, device=device)
    dist.all_reduce(large)  # the first one opens connections
    exact = bool((large == size * (size + 1) / 2).all())
    large.zero_()  # sums of sums would overflow
    dist.all_reduce(small)
    seconds = _median_seconds(lambda: dist.all_reduce(large), repeats, device)
    latency = _median_seconds(lambda: dist.all_reduce(small), 4 * repeats, device)
    return Rates(num_bytes, seconds, latency, exact, size)


def _median_seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    taken = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
