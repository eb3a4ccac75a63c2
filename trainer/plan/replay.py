"""Replays one training step as the tensors that it makes and drops, counted from shapes. Imports no torch.

The order is that of trainer/run/step.py: forward block by block, loss in chunks, backward, update, with FSDP2's
gathers and reductions between them. A tensor is in the replay when it can live at the peak; what is small
beside its neighbours (scalars, one number a token) is left out.

Reversible blocks (models/revffn.py) keep the last two streams and those at anchors; backward rebuilds the others half
by half, where its recompute makes what the half would have kept.
"""

from dataclasses import replace

from stepline.trainer.config import Config
from stepline.trainer.plan.activations import Sizes
from stepline.trainer.plan.collectives import Collectives, Tally
from stepline.trainer.plan.sync_memory import SyncMemory
from stepline.trainer.plan.tensors import (
    Group,
    Shape,
    block_group,
    cast_group,
    ffn_shapes,
    root_group,
    trained_groups,
)

CHUNK_LOGITS = {"cuda": 2**27, "cpu": 2**21}
"""Of kernels/cross_entropy.py, which imports torch."""
ONE_GROUP_BYTES = 2**24
"""Of comm/fsdp.py."""
CUBLAS_WORKSPACE = 2 * 2**25
"""What torch gives cuBLAS on Hopper in forward's thread and in backward's; a quarter on older devices."""


class Replay(Collectives):
    """One rank's optimizer step: call `run` once and read `tally`."""

    def __init__(
        self,
        config: Config,
        world: int,
        shard: int,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        self.sizes = sizes = Sizes(config, micro_batch)
        self.config, self.model, self.accumulation = config, config.model, accumulation
        spread = world if config.parallel.sync == "all_reduce" else shard
        super().__init__(Tally(), shard, config.parallel.experts, spread, sizes.compute, sizes.master)
        if config.precision.reduce == "bf16":
            self.reduction = 2
        self.replicas = world // shard
        self.gloo = not sizes.cuda
        self.reshards = config.parallel.reshard_after_forward
        self.layers = self.model.num_layers
        self.table = 0 if sizes.frozen else self.model.vocab_size * self.model.hidden_size
        """Elements of the gradient of the embedding, or of the head."""
        sizes.holds_casts = not self.fsdp
        self.root, self.block, self.experts = self.groups()
        whole = Group(root_group(self.model).shapes + block_group(self.model).shapes * self.layers)
        if self.fsdp and not self.reshards and whole.numel * self.master <= ONE_GROUP_BYTES:
            # comm/fsdp.py: a small model is one group, but for experts that are dealt
            block, self.block = self.block, Group(())
            self.root = Group(
                self.root.shapes + block.shapes * self.layers,
                block.narrow * self.layers,
                frozen=self.root.frozen + block.frozen * self.layers,
            )
        standard = self.sizes.hidden + self.sizes.wide_norm(self.model.hidden_size)
        self.last = 2 * self.sizes.stream if self.sizes.reversible else standard
        """The last block's output, or the two streams joined, as the final norm keeps it."""

    def groups(self) -> tuple[Group, Group, Group]:
        """What is gathered and reduced together: the root's, a block's, and those of its experts that are dealt."""
        root, block = (
            root_group(self.model, self.sizes.frozen),
            block_group(self.model, self.sizes.frozen),
        )
        narrow = cast_group(self.model).shapes if self.config.precision.fp8 and self.fsdp else ()
        if self.parts == 1:
            return root, replace(block, narrow=narrow), Group(())

        def rest(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
            return tuple(shape for shape in shapes if len(shape) < 3)

        def dealt(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
            return tuple((s[0] // self.parts, *s[1:]) for s in shapes if len(s) == 3)

        return (
            root,
            Group(rest(block.shapes), narrow, frozen=rest(block.frozen)),
            Group(dealt(block.shapes), dealt=True, frozen=dealt(block.frozen)),
        )

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
        shard = self.shard if self.fsdp else 1
        root, block = (
            root_group(self.model, self.sizes.frozen),
            block_group(self.model, self.sizes.frozen),
        )
        whole = Group(root.shapes + block.shapes * self.layers)
        self.tally.add("parameters", whole.shard(shard) * self.master)
        if self.config.precision.fp8 and self.fsdp:  # the shards as they are gathered
            self.tally.add("parameters", cast_group(self.model).shard(shard) * self.layers)
        trained = trained_groups(self.model, self.sizes.frozen)
        self.sync = SyncMemory(self.config, *trained, shard, self.replicas, self.master)
        self.tally.add("optimizer", self.sync.state() + self.sync.flying())
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
            for group in (self.block, self.experts):
                if group.shapes:
                    self.start_gather(group)
                    self.finish_gather(group)
                    self.free_flat(before)
                    before = group
            tally.add("activations", self.sizes.kept() + self.sizes.anchors(layer))
            if self.reshards:
                self.reshard(self.block)
                self.reshard(self.experts)
        tally.add("activations", self.last)
        self.last_gathered = before

    def loss(self, first: bool) -> None:
        """Chunks of logits, with the gradients of hidden states and head (kernels/cross_entropy.py)."""
        tally, sizes, hidden = self.tally, self.sizes, self.sizes.hidden
        head = self.table  # its gradient
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
        self.gradient(0 if self.sizes.frozen else self.model.hidden_size, first)  # the norm's
        tally.add("activations", behind)
        tally.drop("activations", hidden + self.last)
        for layer in reversed(range(self.layers)):
            tally.moment = f"backward of block {layer + 1} of {self.layers}"
            ahead = (self.block,) if layer else ()
            self.arrive(self.block, *((self.experts,) if self.experts.shapes else ahead))
            if self.experts.shapes:
                self.arrive(self.experts, *ahead)
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
        self.gradient(self.table, first)
        tally.drop("activations", hidden + sizes.tables())
        if self.model.tied_embeddings:  # the head's gradient, which waited for this one
            self.tally.drop("gradients", self.table * self.compute)
        self.reshard(self.root)
        self.reduce(self.root, first)
        tally.drop("all-gather", self.reduced)
        self.reduced = 0

    def arrive(self, group: Group, *ahead: Group) -> None:
        """`group` is gathered for its backward, and the gather of the one that comes next starts."""
        if self.reshards:
            self.finish_gather(group)
            self.free_flat(group)
            for following in ahead:
                self.start_gather(following)

    def block_backward(self, first: bool) -> None:
        """Recompute, then the feed-forward half, then attention."""
        tally, sizes = self.tally, self.sizes
        # selective recompute also keeps w2's result, which nothing takes
        unused = sizes.hidden if self.config.run.recompute == "selective" else 0
        tally.add("activations", sizes.saved() + unused - sizes.kept())
        self.ffn_backward(first)
        tally.drop("activations", sum(sizes.ffn_saved().values()))
        self.reshard(self.experts)
        self.reduce(self.experts, first)
        self.attention_backward(first)
        tally.drop("activations", sum(sizes.attention_saved().values()) + unused)

    def ffn_backward(self, first: bool) -> None:
        """Gradients of the feed-forward half; what it saved is still there."""
        tally, sizes, model = self.tally, self.sizes, self.model
        weights, mixture = self.trained_ffn(), sizes.mixture
        if mixture:  # gradients of the rows that the experts made: scored, in the scores' type, and not
            tally.brief("activations", sizes.copies * (sizes.inner + sizes.statistics(model.inner_size)))
        tally.brief("activations", sizes.ffn_product(model.ffn_size, model.inner_size))
        self.gradient(weights // 3, first)  # w2
        tally.add("activations", sizes.ffn - sizes.product())  # the gradient of the product, which goes
        tally.brief("activations", (1 if sizes.compiled and not mixture else 2) * sizes.ffn)
        tally.drop("activations", sizes.ffn)  # when those of silu and of w3 x are there, in the place of both
        backward = sizes.ffn_product(model.inner_size, model.ffn_size)
        tally.brief("activations", backward)  # of w3
        self.gradient(weights // 3, first)
        tally.brief(
            "activations", backward + sizes.copies * sizes.inner - 2 * sizes.ffn
        )  # of w1, beside w3's result
        tally.add("activations", sizes.product())
        self.gradient(weights - 2 * (weights // 3), first)

    def trained_ffn(self) -> int:
        """Elements of the feed-forward layer that have a gradient, all of them or none."""
        return 0 if self.sizes.frozen else Group(ffn_shapes(self.model, self.parts)).numel

    def attention_backward(self, first: bool) -> None:
        """Gradients of the attention half and of the block's norms, and of all adapters."""
        sizes, model = self.sizes, self.model
        ffn = 0 if self.sizes.frozen else Group(ffn_shapes(model)).numel
        self.gradient(block_group(model, self.sizes.frozen).trained.numel - ffn, first)
        # of attention's result, of q, k and v; flash attention on CUDA sums q's in fp32
        beside = 2 * sizes.width(sizes.query) + 2 * sizes.width(sizes.key)
        beside += sizes.statistics(sizes.query) if sizes.cuda else 0
        product = sizes.attention_products.backward(sizes.tokens, sizes.query, model.inner_size)
        self.tally.brief("activations", max(beside, product))

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
            if half == self.ffn_backward:
                self.reshard(self.experts)
                self.reduce(self.experts, first)
                if layer == self.layers - 1:
                    # the gradient of the joined streams is one tensor, until each stream's is another
                    tally.add("activations", sizes.stream)
        if layer == self.layers - 1:
            tally.drop("activations", sizes.stream)
