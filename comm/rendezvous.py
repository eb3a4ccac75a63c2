"""What ranks tell each other by the launcher's key-value store before they connect: which part of it belongs to this
attempt alone, and on what kind of device each of them is."""

import socket
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

POLL_S = 0.02
NAMED = 4
"""Nodes without a GPU that are named."""


class UnlikeDevices(Exception):
    """Some ranks have a GPU and others have none."""


def attempt_store(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The part of `store` that only the ranks of this attempt use; a collective.

    torchrun keeps one store over all restarts, so ranks that start again would find the addresses of their dead
    forerunners under the same keys. Rank 0 therefore names a fresh prefix and answers each rank by the number that
    this rank has just drawn, until all have confirmed: what an earlier attempt left confirms nothing.

    Raises `DistStoreError` when ranks do not come within `timeout`.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", mine)
        store.wait([f"welcome/{mine}"], timeout)
        prefix = store.get(f"welcome/{mine}").decode()
        store.set(f"{prefix}/confirmed/{rank}", "")
        return dist.PrefixStore(prefix, store)
    missing, deadline = set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"{mine}/confirmed/{other}"]):
                missing.discard(other)
            elif store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", mine)
        if missing and time.monotonic() > deadline:
            raise dist.DistStoreError(f"rank {min(missing)} did not come")
        time.sleep(POLL_S)
    return dist.PrefixStore(mine, store)


def check_kinds(store: dist.Store, size: int, kind: str, timeout: timedelta) -> None:
    """Raises UnlikeDevices, on all ranks, where some are on `cuda` and some on `cpu`: NCCL would wait for the latter
    until it gives up. A collective; raises `DistStoreError` when ranks do not come within `timeout`."""
    if kind != "cuda":
        store.set(f"kind/without/{store.add('kind/without', 1)}", socket.gethostname())
    if store.add("kind/told", 1) == size:
        store.set("kind/all", "")
    store.wait(["kind/all"], timeout)
    without = store.add("kind/without", 0)
    if not 0 < without < size:
        return
    hosts = sorted({store.get(f"kind/without/{i + 1}").decode() for i in range(without)})
    named = ", ".join(hosts[:NAMED]) + (f" and {len(hosts) - NAMED} more" if len(hosts) > NAMED else "")
    if store.add("kind/read", 1) == size:
        store.set("kind/all read", "")
    store.wait(["kind/all read"], timeout)  # the store may end with a rank
    raise UnlikeDevices(f"{without} of {size} ranks have no usable GPU (on {named})")
