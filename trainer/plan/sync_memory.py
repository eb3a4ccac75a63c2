"""Bytes of the synchronisers: their state, in memory and in a checkpoint, and what their update takes for a moment.

Imports no torch.
"""

import math

from stepline.trainer.config import Config
from stepline.trainer.plan.demo_memory import Batch, batches, exchanged, messages, packet
from stepline.trainer.plan.tensors import Group, local_shape, trained_groups
from stepline.trainer.plan.update import BUCKET_ELEMENTS, adamw_state, muon_state, muon_temporaries

NONE = Group(())


class SyncMemory:
    """What a rank's share of `root` (embedding, norm, head) and `blocks` takes under `parallel.sync`.

    item: bytes of an element.
    """

    def __init__(
        self, config: Config, root: Group, blocks: Group, shard: int, replicas: int, item: int
    ) -> None:
        self.config, self.root, self.blocks, self.shard, self.item = config, root, blocks, shard, item
        self.replicas, self.parallel = replicas, config.parallel
        self.every = root.shapes + blocks.shapes
        self.whole = Group(self.every).shard(shard) * item
        self.vectors = Group(tuple(s for s in self.every if len(s) < 2))
        self.matrices = Group(tuple(blocks.matrices()))
        self.ends = Group(tuple(root.matrices()))

    def inner(self, moments: int = 2) -> int:
        """State of the config's optimizer over all parameters; moments: AdamW's."""
        state = muon_state if self.config.optimizer.name == "muon" else adamw_state
        return state(self.root, self.blocks, self.shard, self.item, moments)

    def state(self) -> int:
        """Bytes that stay."""
        return sum(self.shares())

    def shares(self) -> tuple[int, int]:
        """Of `state`, the bytes that are alike on all replicas and those that each replica has its own of; the values
        that the replicas agree on are not among the former, and where each has values of its own, those are the
        latter's."""
        sync, demo = self.parallel.sync, self.parallel.demo
        if sync == "all_reduce":
            return self.inner(), 0
        if sync == "diloco":
            return self.whole, self.inner() + self.whole  # outer momentum; beside an anchor, which all share
        dense = adamw_state(self.vectors, NONE, self.shard, self.item)
        matrices, ends = (group.shard(self.shard) * self.item for group in (self.matrices, self.ends))
        # the optimizer's state, without a first moment and the vectors, and its updates
        waits = self.inner(1) - adamw_state(self.vectors, NONE, self.shard, self.item, 1) + matrices + ends
        if sync == "random_k":
            return dense, waits
        landed = demo.delay * self.whole  # the update that has
        if demo.faithful:
            return landed, self.whole
        owed = 0
        if self.owners():
            owed = sum(batch.elements for batch in self.batches()) * self.item // self.replicas
        if demo.accumulate == "gradients":
            waits = matrices + adamw_state(self.ends, NONE, self.shard, self.item, 1) + ends
        return dense + landed, waits + owed + demo.looks_ahead * self.whole

    def temporaries(self) -> int:
        """Most bytes that the update holds beside the state."""
        sync, demo = self.parallel.sync, self.parallel.demo
        muon = 0
        if self.config.optimizer.name == "muon" or (sync == "demo" and demo.phi == "muon"):
            item = 2 if self.config.run.device == "cuda" and self.item == 4 else self.item
            muon = muon_temporaries(self.blocks, self.shard, item, self.item)
        if sync == "all_reduce":
            return muon
        if sync == "diloco":
            return max(muon, self._diloco() // self.parallel.diloco.fragments)
        if sync == "random_k":
            return max(muon, self._random_k())
        found, fused = self.batches(), self._fused()
        if demo.phi == "muon":  # of all that has been decoded, whose rows CPUs take as they are
            rows = 0 if fused else min(self.matrices.shard(self.shard), BUCKET_ELEMENTS) * self.item
            applied = self.whole + muon - rows
        else:
            signs = demo.phi == "sign" and any(batch.published for batch in found)
            largest = max(math.prod(local_shape(s, self.shard)) for s in self.every) * self.item
            applied = 0 if fused else max(batch.applying(largest if signs else 0) for batch in found)
        return max(muon, exchanged(found, self.codec(), self.replicas, self.owners(), fused, applied))

    def flying(self) -> int:
        """Packets that are under way beside a forward and backward."""
        demo = self.parallel.demo
        if self.parallel.sync != "demo" or not demo.delay:
            return 0
        found, owners = self.batches(), self.owners()
        first = packet(found, self.codec()) if owners else 0  # to all owners, in one piece
        return first + messages(found, self.codec(), self.replicas, owners)

    def owners(self) -> bool:
        """Whether each replica reduces a share of the chunks."""
        demo = self.parallel.demo
        return not demo.faithful and self.replicas > demo.owner_reduce_above

    def _diloco(self) -> int:
        """Distances, into which their mean comes; bf16: and as they travel; int8: and all replicas' packets with a copy
        of one, of which bytes are made numbers, and these are scaled."""
        values, codec = self.whole // self.item, self.parallel.diloco.codec
        if codec == "int8":
            return 3 * self.whole + (self.replicas + 2) * values
        return self.whole + (2 * values if codec == "bf16" else 0)

    def _random_k(self) -> int:
        """For each value: where it is, itself in a list and as it travels, what it was rounded to, and the mean before
        and after it is divided."""
        random_k = self.parallel.random_k
        length = max(1, round(1 / random_k.density))
        matrices = [math.prod(local_shape(s, self.shard)) for s in self.every if len(s) > 1]
        values = sum(-(-numel // length) for numel in matrices)
        rounded = 2 + 2 * self.item if random_k.codec == "bf16" else self.item
        return values * (8 + 2 * self.item + rounded)

    def codec(self) -> str:
        """How values travel."""
        return "fp32" if self.parallel.demo.faithful else self.parallel.demo.codec

    def _fused(self) -> bool:
        return self.config.run.device == "cuda" and self.item == 4

    def batches(self) -> list[Batch]:
        """As comm/demo.py makes them of this rank's parameters."""
        ends = [(local_shape(shape, self.shard), True) for shape in self.root.shapes]
        blocks = [(local_shape(shape, self.shard), False) for shape in self.blocks.shapes]
        return batches(ends + blocks, self.parallel.demo, self.item)


def checkpoint_bytes(config: Config, world: int) -> int:
    """Of a checkpoint of `world` ranks, of a resolved config: what is trained, and all state of all replicas."""
    trained = trained_groups(config.model, config.optimizer.only == "adapters")
    replicas, item = world // config.parallel.shard, 8 if config.precision.compute == "fp64" else 4
    memory = SyncMemory(config, *trained, 1, replicas, item)
    alike, own = memory.shares()
    return memory.whole + alike + replicas * own
