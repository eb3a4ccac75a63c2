"""Bytes of the synchronisers: their state, and what their update takes for a moment. Imports no torch."""

from collections import Counter

from stepline.trainer.config import Config
from stepline.trainer.plan.tensors import Group, Shape
from stepline.trainer.plan.update import adamw_state, muon_state, muon_temporaries

BATCH_ELEMENTS = 2**26
"""Of comm/packets.py, which imports torch."""
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
        every = root.shapes + blocks.shapes
        self.whole = Group(every).shard(shard) * item
        self.vectors = Group(tuple(s for s in every if len(s) < 2))
        self.matrices = Group(tuple(blocks.matrices()))
        self.ends = Group(tuple(root.matrices()))

    def inner(self) -> int:
        """State of the config's optimizer over all parameters."""
        state = muon_state if self.config.optimizer.name == "muon" else adamw_state
        return state(self.root, self.blocks, self.shard, self.item)

    def state(self) -> int:
        """Bytes that stay."""
        sync, demo = self.parallel.sync, self.parallel.demo
        if sync == "all_reduce":
            return self.inner()
        if sync == "diloco":
            return self.inner() + 2 * self.whole  # anchor and outer momentum
        dense = adamw_state(self.vectors, NONE, self.shard, self.item)
        matrices, ends = (group.shard(self.shard) * self.item for group in (self.matrices, self.ends))
        waits = self.inner() - dense + matrices + ends  # the optimizer's state and its updates
        if sync == "random_k":
            return waits + dense
        if demo.faithful:
            return self.whole + (self.whole if demo.delay else 0)
        owed = 0
        if self.replicas > demo.owner_reduce_above:
            owed = self._by_chunk().total() * self.item // self.replicas
        if demo.accumulate == "gradients":
            waits = matrices + adamw_state(self.ends, NONE, self.shard, self.item) + ends
        return dense + waits + owed + (self.whole if demo.delay else 0)

    def temporaries(self) -> int:
        """Most bytes that the update holds beside the state."""
        sync, demo = self.parallel.sync, self.parallel.demo
        muon = 0
        if self.config.optimizer.name == "muon" or (sync == "demo" and demo.phi == "muon"):
            item = 2 if self.config.run.device == "cuda" and self.item == 4 else self.item
            muon = muon_temporaries(self.blocks, self.shard, item, self.item)
        if sync == "all_reduce":
            return muon
        if (
            sync == "diloco"
        ):  # distances, what travels, and their mean; int8: bytes, and what they are made of
            copies = 5 if self.parallel.diloco.codec == "int8" else 3
            return max(muon, copies * self.whole // self.parallel.diloco.fragments)
        largest = (
            max(Group((s,)).shard(self.shard) for s in self.root.shapes + self.blocks.shapes) * self.item
        )
        if sync == "random_k":
            return largest + int(4 * 8 * self.whole / self.item * self.parallel.random_k.density)
        chunks = min(max(self._by_chunk().values()), BATCH_ELEMENTS) * self.item
        read = int(self.replicas * self.whole / self.item * demo.density * (8 + self.item))
        return read + max(3 * chunks, muon + self.whole if muon else 0)

    def _by_chunk(self) -> Counter[Shape]:
        """Elements that are transformed together (comm/packets.py), by the shape of their chunks."""
        limit, found = self.parallel.demo.side, Counter()
        for rows, cols in self.matrices.shapes:
            mine = -(-rows // self.shard)
            height, width = (-(-n // -(-n // limit)) for n in (mine, cols))
            found[height, width] += -(-mine // height) * -(-cols // width) * height * width
        for shape in self.ends.shapes:
            found[1, limit * limit] += Group((shape,)).shard(self.shard)
        return found
