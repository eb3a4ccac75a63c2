"""Replays one training step as the tensors that it makes and drops, counted from shapes. Imports no torch.

The order is that of trainer/run/step.py: forward block by block, loss in chunks, backward, update, with FSDP2's
gathers and reductions between them. A tensor is in the replay when it can live at the peak; what is small
beside its neighbours (scalars, one number a token) is left out.

Reversible blocks (models/revffn.py) keep the last two streams and those at anchors; backward rebuilds the others half
by half, where its recompute makes what the half would have kept.
"""

from collections import Counter

from stepline.trainer.config import Config
from stepline.trainer.plan.sync_memory import SyncMemory
from stepline.trainer.plan.tensors import Group, Sizes, block_group, cast_group, ffn_shapes, root_group

CHUNK_LOGITS = {"cuda": 2**27, "cpu": 2**21}
"""Of kernels/cross_entropy.py, which imports torch."""
ONE_GROUP_BYTES = 2**24
"""Of comm/fsdp.py."""
CUBLAS_WORKSPACE = 2 * 2**25
"""What torch gives cuBLAS on Hopper in forward's thread and in backward's; a quarter on older devices."""


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


class Replay:
    """One rank's optimizer step: call `run` once and read `tally`."""

    def __init__(
        self,
        config: Config,
        world: int,
        shard: int,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        self.tally, self.sizes = Tally(), Sizes(config, micro_batch)
        self.config, self.model, self.shard, self.accumulation = config, config.model, shard, accumulation
        self.compute, self.master = self.sizes.compute, self.sizes.master
        self.replicas = world // shard
        # run/build.py: one rank that computes in its master dtype needs no FSDP
        self.spread = world if config.parallel.sync == "all_reduce" else shard
        self.fsdp = self.spread > 1 or self.compute != self.master
        self.gloo = shard > 1 and not self.sizes.cuda  # it works on a copy of what it sends
        self.reshards = config.parallel.reshard_after_forward
        self.root, self.block, self.layers = (
            root_group(self.model),
            block_group(self.model),
            self.model.num_layers,
        )
        whole = Group(self.root.shapes + self.block.shapes * self.layers)
        if self.fsdp and not self.reshards and whole.numel * self.master <= ONE_GROUP_BYTES:
            self.root, self.block = whole, Group(())  # comm/fsdp.py: a small model is one group
        standard = self.sizes.hidden + self.sizes.wide_norm(self.model.hidden_size)
        self.last = 2 * self.sizes.stream if self.sizes.reversible else standard
        """The last block's output, or the two streams joined, as the final norm keeps it."""
        self.reduced = 0  # bytes of the reductions' buffer, which FSDP2 keeps until it needs the next one

    def run(self) -> None:
        """Every moment from the first gather to the update."""
        self.hold()
        for micro_batch in range(min(2, self.accumulation)):  # the second is like all that follow
            self.forward()
            self.loss(first=micro_batch == 0)
            self.backward(first=micro_batch == 0)
        self.update()

    def hold(self) -> None:
        """What is there from the start: parameters, optimizer's state, batch."""
        whole = Group(self.root.shapes + self.block.shapes * self.layers)
        shard = self.shard if self.fsdp else 1
        blocks = Group(block_group(self.model).shapes * self.layers)
        self.tally.add("parameters", whole.shard(shard) * self.master)
        if (
            self.config.precision.fp8 and self.fsdp
        ):  # the cast shards; what is gathered is counted as if it were whole
            self.tally.add("parameters", cast_group(self.model).shard(shard) * self.layers)
        self.sync = SyncMemory(self.config, root_group(self.model), blocks, shard, self.replicas, self.master)
        self.tally.add("optimizer", self.sync.state())
        self.tally.add("fixed", self.fixed())

    def update(self) -> None:
        """The optimizer's."""
        self.tally.moment = "update"
        self.tally.brief("optimizer", self.sync.temporaries())

    def fixed(self) -> int:
        """The batch (inputs, targets; document numbers) and the guard's history; cuBLAS's workspaces."""
        numbers = 20 if self.config.data.confine_attention else 16
        batch = self.accumulation * self.sizes.tokens * numbers
        guard = 3 * 8 * self.config.optimizer.guard.window
        return batch + guard + (CUBLAS_WORKSPACE if self.sizes.cuda else 0)

    # FSDP2, as in torch.distributed.fsdp._fully_shard

    def start_gather(self, group: Group) -> None:
        """All-gather into one flat buffer."""
        if not self.fsdp or self.shard == 1:
            return
        flat = group.shard(self.shard) * self.shard * self.compute
        if self.compute != self.master:
            self.tally.brief("all-gather", flat + flat // self.shard)  # the shard in the compute dtype
        self.tally.add("all-gather", flat)
        if self.gloo:
            self.tally.brief("all-gather", flat)

    def finish_gather(self, group: Group) -> None:
        """The parameters are copied out of the flat buffer."""
        if self.fsdp:
            self.tally.add("all-gather", group.numel * self.compute)

    def free_flat(self, group: Group) -> None:
        """The flat buffer of `group` goes."""
        if self.fsdp and self.shard > 1:
            self.tally.drop("all-gather", group.shard(self.shard) * self.shard * self.compute)

    def reshard(self, group: Group) -> None:
        """The gathered parameters go."""
        if self.fsdp:
            self.tally.drop("all-gather", group.numel * self.compute)

    def reduce(self, group: Group, first: bool) -> None:
        """Whole gradients become this rank's shard of their sum; the flat input stays until the next group's."""
        if not self.fsdp or not group.shapes:
            return
        whole = group.shard(self.shard) * self.shard * self.master
        self.tally.drop("all-gather", self.reduced)
        self.tally.add("all-gather", whole)
        self.tally.drop("gradients", group.numel * self.compute)
        self.tally.add("gradients", whole // self.shard)
        divided = self.shard == 1 and self.spread > 1  # replicas of one rank divide by 1, out of place
        if self.gloo or divided:
            self.tally.brief("all-gather", whole)
        if not first:
            self.tally.drop("gradients", whole // self.shard)  # added to the one that is there
        self.reduced = whole

    def gradient(self, elements: int, first: bool) -> None:
        """Whole gradient of a weight; without FSDP it is added at once to that of the micro-batch before."""
        self.tally.add("gradients", elements * self.compute)
        if not self.fsdp and not first:
            self.tally.drop("gradients", elements * self.compute)

    # the step

    def forward(self) -> None:
        """Up to the last block's output."""
        tally = self.tally
        tally.moment = "forward"
        self.start_gather(self.root)
        self.finish_gather(self.root)
        tally.add("activations", self.sizes.tables())
        before = self.root
        for layer in range(self.layers):
            if self.block.shapes:
                self.start_gather(self.block)
                self.finish_gather(self.block)
                self.free_flat(before)
                before = self.block
            tally.add("activations", self.sizes.kept() + self.sizes.anchors(layer))
            if self.reshards:
                self.reshard(self.block)
        tally.add("activations", self.last)
        self.last_gathered = before

    def loss(self, first: bool) -> None:
        """Chunks of logits, with the gradients of hidden states and head (kernels/cross_entropy.py)."""
        tally, sizes, hidden = self.tally, self.sizes, self.sizes.hidden
        head = self.model.vocab_size * self.model.hidden_size
        tally.moment = "loss"
        tally.add("activations", hidden)  # normed
        tally.add("logits", hidden + head * self.master)
        tally.brief("logits", sizes.loss_chunk(CHUNK_LOGITS["cuda" if sizes.cuda else "cpu"]))
        if self.compute != self.master:
            tally.add("logits", head * self.compute)
            tally.drop("logits", head * self.master)
        tally.drop("activations", hidden)
        self.free_flat(self.last_gathered)
        tally.moment = "backward of the loss"
        if self.reshards:
            self.start_gather(self.block)  # ahead, for the last block
        tally.add("activations", hidden)
        self.gradient(head, first or self.model.tied_embeddings)
        tally.drop("logits", hidden + head * self.compute)

    def backward(self, first: bool) -> None:
        """From the final norm to the embedding."""
        tally, sizes, hidden = self.tally, self.sizes, self.sizes.hidden
        behind = 2 * sizes.stream if sizes.reversible else hidden  # gradient behind a block
        self.gradient(self.model.hidden_size, first)  # the norm's
        tally.add("activations", behind)
        tally.drop("activations", hidden + self.last)
        for layer in reversed(range(self.layers)):
            tally.moment = f"backward of block {layer + 1} of {self.layers}"
            if self.reshards:
                self.finish_gather(self.block)
                self.free_flat(self.block)
                if layer:
                    self.start_gather(self.block)
            if sizes.reversible:
                self.reversible_backward(layer, first)
            else:
                self.block_backward(first)
            self.reshard(self.block)
            self.reduce(self.block, first)
            tally.drop("activations", sizes.anchors(layer - 1 if layer else self.layers - 1))
        tally.moment = "backward of the embedding"
        tally.add("activations", hidden)
        tally.drop("activations", behind)
        self.gradient(self.model.vocab_size * self.model.hidden_size, first)
        tally.drop("activations", hidden + sizes.tables())
        if self.model.tied_embeddings:  # the head's gradient, which waited for this one
            self.tally.drop("gradients", self.model.vocab_size * self.model.hidden_size * self.compute)
        self.reshard(self.root)
        self.reduce(self.root, first)
        tally.drop("all-gather", self.reduced)
        self.reduced = 0

    def block_backward(self, first: bool) -> None:
        """Recompute, then the feed-forward half, then attention."""
        tally, sizes = self.tally, self.sizes
        # selective recompute also keeps w2's result, which nothing takes
        unused = sizes.hidden if self.config.run.recompute == "selective" else 0
        tally.add("activations", sizes.saved() + unused - sizes.kept())
        self.ffn_backward(first)
        tally.drop("activations", sum(sizes.ffn_saved().values()))
        self.attention_backward(first)
        tally.drop("activations", sum(sizes.attention_saved().values()) + unused)

    def ffn_backward(self, first: bool) -> None:
        """Gradients of the feed-forward half; its product goes, the rest of what it saved is still there."""
        tally, sizes = self.tally, self.sizes
        weights, mixture = Group(ffn_shapes(self.model)).numel, self.model.ffn == "moe"
        if mixture:  # gradients of the rows that the experts made: scored, in the scores' type, and not
            tally.brief("activations", sizes.copies * (sizes.inner + sizes.statistics(self.model.inner_size)))
        self.gradient(weights // 3, first)  # w2
        tally.add("activations", sizes.ffn)  # of the product
        tally.drop("activations", sizes.ffn)  # the product
        tally.brief(
            "activations", (1 if sizes.compiled and not mixture else 2) * sizes.ffn
        )  # of silu and of w3 x
        self.gradient(weights - weights // 3, first)  # w1, w3

    def attention_backward(self, first: bool) -> None:
        """Gradients of the attention half and of the block's norms."""
        sizes, model = self.sizes, self.model
        self.gradient(block_group(model).numel - Group(ffn_shapes(model)).numel, first)
        # of attention's result, of q, k and v; flash attention on CUDA sums q's in fp32
        beside = 2 * sizes.width(sizes.query) + 2 * sizes.width(sizes.key)
        beside += sizes.statistics(sizes.query) if sizes.cuda else 0
        self.tally.brief("activations", beside)

    def reversible_backward(self, layer: int, first: bool) -> None:
        """Each half again, from the stream that it read, and the other stream by subtraction."""
        tally, sizes = self.tally, self.sizes
        tally.drop("activations", sizes.kept())  # which the recompute keeps in its turn
        cast = 0 if self.compute == self.master else sizes.width(self.model.hidden_size // 2)
        for saved, half in (
            (sizes.ffn_saved(), self.ffn_backward),
            (sizes.attention_saved(), self.attention_backward),
        ):
            made = sum(saved.values()) + cast  # cast: the gradient of the half's result
            tally.add("activations", made)
            tally.brief("activations", sizes.inverting())
            half(first)
            tally.brief("activations", 2 * sizes.stream)  # gradient of the stream that was read, and its sum
            tally.drop("activations", made)
            if layer == self.layers - 1 and half == self.ffn_backward:
                # the gradient of the joined streams is one tensor, until each stream's is another
                tally.add("activations", sizes.stream)
        if layer == self.layers - 1:
            tally.drop("activations", sizes.stream)
