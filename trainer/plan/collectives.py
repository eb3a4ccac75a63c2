"""What FSDP2's gathers and reductions hold, as in torch.distributed.fsdp._fully_shard. Imports no torch."""

from collections import Counter

from stepline.trainer.plan.tensors import Group


class Tally:
    """Bytes that live now, by part; the moment when their sum was largest, and each part's own largest."""

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()
        self.moment, self.peak_moment = "", ""

    def add(self, part: str, size: int) -> None:
        """`size` bytes are allocated."""
        self.live[part] += size
        self.largest[part] = max(self.largest[part], self.live[part])
        if self.live.total() > self.peak.total():
            self.peak, self.peak_moment = self.live.copy(), self.moment

    def drop(self, part: str, size: int) -> None:
        """`size` bytes are freed."""
        self.live[part] -= size

    def brief(self, part: str, size: int) -> None:
        """Allocated and freed at once."""
        self.add(part, size)
        self.drop(part, size)


class Collectives:
    """The collectives of one rank's step.

    shard: ranks that share a replica; parts: those of them that deal the experts; spread: ranks over which gradients
    are summed; compute, master: bytes of an element.
    """

    def __init__(self, tally: Tally, shard: int, parts: int, spread: int, compute: int, master: int) -> None:
        self.tally, self.shard, self.parts, self.spread = tally, shard, parts, spread
        self.compute, self.master = compute, master
        self.reduction = master
        """Of an element while gradients are summed."""
        # run/build.py: one rank that computes in its master dtype needs no FSDP
        self.fsdp = spread > 1 or compute != master
        self.gloo = False
        """It works on a copy of what it sends."""
        self.reduced = 0
        """Bytes of the reductions' buffer, which FSDP2 keeps until it needs the next one."""

    def ranks(self, group: Group) -> int:
        """Those that share `group`: a rank's experts are shared by the ranks that have the same ones."""
        return self.shard // self.parts if group.dealt else self.shard

    def start_gather(self, group: Group) -> None:
        """All-gather into one flat buffer."""
        ranks = self.ranks(group)
        if not self.fsdp or ranks == 1:
            return
        flat = group.flat(ranks, self.compute)
        if self.compute != self.master:  # the shard in the compute dtype
            self.tally.brief("all-gather", flat + group.wide_shard(ranks) * self.compute)
        self.tally.add("all-gather", flat)
        if self.gloo:
            self.tally.brief("all-gather", flat)

    def finish_gather(self, group: Group) -> None:
        """The parameters are copied out of the flat buffer."""
        if self.fsdp:
            self.tally.add("all-gather", group.gathered(self.compute))

    def free_flat(self, group: Group) -> None:
        """The flat buffer of `group` goes."""
        ranks = self.ranks(group)
        if self.fsdp and ranks > 1:
            self.tally.drop("all-gather", group.flat(ranks, self.compute))

    def reshard(self, group: Group) -> None:
        """The gathered parameters go."""
        if self.fsdp:
            self.tally.drop("all-gather", group.gathered(self.compute))

    def reduce(self, group: Group, first: bool) -> None:
        """Whole gradients become this rank's shard of their sum; the flat input stays until the next group's."""
        group = group.trained
        if not self.fsdp or not group.shapes:
            return
        ranks = self.ranks(group)
        whole, part = group.shard(ranks) * ranks * self.reduction, group.shard(ranks) * self.master
        self.tally.drop("all-gather", self.reduced)
        self.tally.add("all-gather", whole)
        self.tally.drop("gradients", group.numel * self.compute)
        if self.reduction != self.master:
            self.tally.brief("gradients", group.shard(ranks) * self.reduction)  # before it is cast
        self.tally.add("gradients", part)
        divided = ranks == 1 and self.spread > 1  # one rank alone divides by 1, out of place
        if divided or (self.gloo and ranks > 1):
            self.tally.brief("all-gather", whole)
        if not first:
            self.tally.drop("gradients", part)  # added to the one that is there
        self.reduced = whole

    def gradient(self, elements: int, first: bool) -> None:
        """Whole gradient of a weight; without FSDP it is added at once to that of the micro-batch before."""
        self.tally.add("gradients", elements * self.compute)
        if not self.fsdp and not first:
            self.tally.drop("gradients", elements * self.compute)
