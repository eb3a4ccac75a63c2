"""What any rank wishes (stop, save), known to all ranks at the same step, without making a step wait."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

STOP_BITS = 7  # numbers of signals end at 64


@dataclass(frozen=True)
class Wish:
    """What all ranks shall do, the most urgent first: it stands for the less urgent ones, since a run that stops saves,
    and none goes on with damaged data."""

    damaged: bool = False
    """A rank has found damaged data."""
    stop: int = 0
    """The number of a signal, or 0."""
    save: bool = False
    """An ephemeral checkpoint is due."""

    def urgency(self) -> int:
        """A number that grows with it."""
        return (self.damaged << STOP_BITS | self.stop) << 1 | self.save

    @classmethod
    def of(cls, urgency: int) -> "Wish":
        """The wish of that urgency."""
        more, save = divmod(urgency, 2)
        damaged, stop = divmod(more, 1 << STOP_BITS)
        return cls(bool(damaged), stop, bool(save))


class Consensus:
    """The most urgent wish of all ranks, found beside the computation. It is one number: gloo sends a message of some
    380 bytes on the wire for each that it reduces, and gathers with (ranks - 1) of them from each rank.

    A decision that only one rank knows of must be acted upon by all ranks in the same step, or they wait for each
    other in different collectives. `begin` before a step starts the exchange, `result` after the step reads it. The
    group is gloo's: the host's wishes never wait for a device's queue. Both are collectives.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._urgency = torch.zeros(1, dtype=torch.int64)
        self._work: dist.Work | None = None

    def begin(self, wish: Wish) -> None:
        """Starts the exchange; every `begin` needs its `result`."""
        self._urgency.fill_(wish.urgency())
        self._work = dist.all_reduce(self._urgency, dist.ReduceOp.MAX, group=self.group, async_op=True)

    def result(self) -> Wish:
        """The most urgent wish of any rank, the same on all ranks."""
        self._work.wait()
        return Wish.of(int(self._urgency))

    def settle(self, wish: Wish) -> Wish:
        """Both at once: waits for all ranks."""
        self.begin(wish)
        return self.result()
