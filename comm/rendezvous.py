"""A part of the launcher's key-value store that belongs to one attempt alone."""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

POLL_S = 0.02


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
