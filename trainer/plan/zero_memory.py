"""A training step's memory on one device behind DeepSpeed ZeRO, counted from shapes. Imports no torch.

The activations are FSDP2's (replay.py). What DeepSpeed holds (version 0.19): weights in the compute type, whole in
stages 1 and 2, a part in stage 3; fp32 masters and moments, this rank's part; one bucket through which gradients are
reduced. What `offload` puts into host memory counts on CPUs alone.
"""

from stepline.trainer.plan.replay import Replay
from stepline.trainer.plan.tensors import Group, block_group, ffn_shapes, root_group
from stepline.trainer.plan.zero import reduce_bucket

FP32 = 4


class ZeroReplay(Replay):
    """One rank's step of `parallel.backend: zero`."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        zero = self.config.parallel.zero
        self.root, self.block = root_group(self.model), block_group(self.model)  # never one group
        self.sizes.holds_casts = True  # what DeepSpeed gathers is in the compute type
        self.stage, self.fsdp = zero.stage, zero.stage == 3 and self.shard > 1
        self.away = self.sizes.cuda and zero.offload != "none"
        self.weights_away = self.sizes.cuda and zero.offload == "all"
        whole = Group(self.root.shapes + self.block.shapes * self.layers)
        self.whole, self.part = whole.numel, flat_part(whole, self.shard, self.stage)
        overlap = self.config.parallel.deepspeed.overlap_comm and self.stage < 3
        item = FP32 if self.stage == 3 else self.compute
        self.bucket = reduce_bucket(self.config, self.whole) * item * (2 if overlap else 1)
        # autograd holds on to the gathered weights of a grouped product, which no hook of DeepSpeed's frees
        grouped = (
            self.model.ffn == "moe" and not self.sizes.reversible and self.config.run.recompute == "none"
        )
        experts = Group(tuple(shape for shape in ffn_shapes(self.model) if len(shape) == 3))
        self.held = experts.numel * self.layers * self.compute if grouped and self.fsdp else 0

    def hold(self) -> None:
        """Weights, masters, moments, and in stage 3 the parts of gradients and the bucket, which stay."""
        tally = self.tally
        if not self.weights_away:
            tally.add("parameters", (self.part if self.stage == 3 else self.whole) * self.compute)
        if not self.away:
            tally.add("parameters", self.part * FP32)
            tally.add("optimizer", 2 * self.part * FP32)
        tally.add("fixed", self.fixed())
        if self.stage == 3:
            tally.add("all-gather", self.bucket)
            if not self.away:
                tally.add("gradients", self.part * FP32)

    def forward(self) -> None:
        """And what stays of the gathered weights."""
        super().forward()
        self.tally.add("all-gather", self.held)

    def gradient(self, elements: int, first: bool) -> None:
        """From stage 2 on a micro-batch's gradients are gone before the next one's."""
        super().gradient(elements, first or self.stage > 1)

    def reduce(self, group: Group, first: bool) -> None:
        """Gradients go through the bucket; stage 1 keeps them whole until the last micro-batch."""
        if self.stage > 1:
            self.tally.drop("gradients", group.numel * self.compute)

    def backward(self, first: bool) -> None:
        """In stages 1 and 2 the bucket lives as long as a backward, at whose end the rank's part is copied."""
        tally = self.tally
        if self.stage == 3:
            super().backward(first)
            tally.drop("all-gather", self.held)
            tally.brief("all-gather", self.bucket)  # what is reduced is a copy
            return
        tally.add("all-gather", self.bucket)
        super().backward(first)
        tally.moment = "reduction"
        if self.stage == 2 and first and not self.away:
            tally.add("gradients", self.part * self.compute)
        tally.brief("all-gather", self.bucket)
        tally.drop("all-gather", self.bucket)

    def update(self) -> None:
        """The rank's part of the gradients in one piece."""
        self.tally.moment = "update"
        if not self.away:
            self.tally.brief("gradients", self.part * FP32)


def flat_part(group: Group, ranks: int, stage: int) -> int:
    """Elements that one rank keeps: of each parameter in stage 3, of all in one piece below it."""
    if stage == 3:
        return sum(-(-Group((shape,)).numel // ranks) for shape in group.shapes)
    return -(-group.numel // ranks)
