"""Bytes that torch's CPU allocator holds over time, from the profiler: what max_memory_allocated is on CUDA."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")


class Allocations:
    """Every allocation and free between `start` and `stop`, temporaries inside of kernels included.

    What was allocated before `start` is unknown: start before the model is built. The profiler does not see
    what gloo's threads free. So collectives return only after those threads have let go of their tensors, and
    gloo's own copies count until the end of the operation that made them.
    """

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._originals: dict[str, Callable] = {}
        self._changes: list[tuple[int, int]] = []
        self._regions: dict[str, tuple[int, int]] = {}

    def start(self) -> None:
        """Begins to count."""
        for name in COLLECTIVES:
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, _patient(self._originals[name]))
        self._profile.start()

    def region(self, name: str) -> AbstractContextManager:
        """Names a stretch of time for `peak`."""
        return record_function(name)

    def stop(self) -> None:
        """Ends counting."""
        self._profile.stop()
        for name, function in self._originals.items():
            setattr(dist, name, function)
        self._read(self._profile.profiler.kineto_results.experimental_event_tree())

    def peak(self, region: str) -> int:
        """Most bytes that lived at one time in the named region."""
        start, end = self._regions[region]
        live = peak = 0
        for moment, size in self._changes:
            live += size
            if start <= moment <= end:
                peak = max(peak, live)
        return peak

    def _read(self, roots: list) -> None:
        """The changes of the allocated bytes, in order, and the regions' times."""
        events = []
        stack = [(root, None) for root in roots]
        while stack:
            event, collective_end = stack.pop()
            if event.tag == _EventType.Allocation:
                fields = event.extra_fields
                events.append((event.start_time_ns, fields.ptr, fields.alloc_size, collective_end))
                continue
            self._regions.setdefault(event.name, (event.start_time_ns, event.end_time_ns))
            if event.name.startswith(("c10d::", "gloo:")):
                collective_end = collective_end or event.end_time_ns
            stack += [(child, collective_end) for child in event.children]
        alive: dict[int, tuple[int, int | None]] = {}
        unseen = []
        for moment, address, size, collective_end in sorted(events, key=lambda event: event[0]):
            if size > 0:
                if address in alive:
                    unseen.append((moment, *alive[address]))
                alive[address] = (size, collective_end)
                self._changes.append((moment, size))
            elif alive.pop(address, None) is not None:
                self._changes.append((moment, size))
        unseen += [(None, *allocation) for allocation in alive.values()]
        for reused, size, collective_end in unseen:
            if end := collective_end or reused:
                self._changes.append((end, -size))
        self._changes.sort()


def _patient(collective: Callable, limit_s: float = 5.0) -> Callable:
    """The collective, returning when nothing but its caller holds the tensors."""

    def call(*args, **kwargs):
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        before = _holders(tensors)
        work = collective(*args, **kwargs)
        deadline = time.monotonic() + limit_s
        while work is None and any(n > m for n, m in zip(_holders(tensors), before)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{collective.__name__} still holds its tensors")
            time.sleep(1e-4)
        return work

    return call


def _holders(tensors: list[torch.Tensor]) -> list[int]:
    """References to each tensor, and tensors that share its storage."""
    storages = [torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) for tensor in tensors]
    return storages + [tensor._use_count() for tensor in tensors]
