"""What any rank wishes (stop, save), known to all ranks at the same step, without making a step wait."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from stepline.comm.replicas import gather_single


class Consensus:
    """An element-wise maximum of small numbers over all ranks, taken beside the computation. They are gathered, which
    gloo does in half the messages of a reduction.

    A decision that only one rank knows of must be acted upon by all ranks in the same step, or they wait for each
    other in different collectives. `begin` before a step starts the exchange, `result` after the step reads it. The
    group is gloo's: the host's wishes never wait for a device's queue. Both are collectives.
    """

    def __init__(self, group: dist.ProcessGroup, size: int) -> None:
        self.group, self.size = group, size
        self._numbers = torch.zeros(dist.get_world_size(group), size, dtype=torch.int64)
        self._work: dist.Work | None = None

    def begin(self, wishes: Sequence[int]) -> None:
        """Starts the exchange of `wishes` (0: none); every `begin` needs its `result`."""
        mine = torch.tensor(wishes, dtype=torch.int64)
        self._work = gather_single(self._numbers.view(-1), mine, group=self.group, async_op=True)

    def result(self) -> list[int]:
        """The largest wish of any rank at each place, the same list on all ranks."""
        self._work.wait()
        return self._numbers.amax(dim=0).tolist()

    def settle(self, wishes: Sequence[int]) -> list[int]:
        """Both at once: waits for all ranks."""
        self.begin(wishes)
        return self.result()
