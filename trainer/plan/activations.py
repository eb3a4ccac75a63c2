"""Sizes of the tensors that a forward and backward make, counted from shapes. Imports no torch."""

from dataclasses import replace

from stepline.models.config import CANON_TAPS
from stepline.trainer.config import Config
from stepline.trainer.plan.products import Products
from stepline.trainer.plan.tensors import Group, Shape, attention_shapes, ffn_shapes, normed_width

ITEM_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


class Sizes:
    """Bytes of what one micro-batch makes, for a config whose device, compute dtype and compile are settled.

    Raises ValueError where one of them is still `auto`.
    """

    def __init__(self, config: Config, micro_batch: int) -> None:
        if "auto" in (config.run.device, config.precision.compute, config.run.compile):
            raise ValueError("run.device, precision.compute and run.compile must be settled")
        model = config.model
        self.config, self.model = config, model
        self.cuda, self.compiled = config.run.device == "cuda", config.run.compile is True
        self.compute = ITEM_BYTES[config.precision.compute]
        self.master = max(4, self.compute)
        """Parameters, optimizer state, reductions, statistics and loss: fp32, or fp64 where compute is."""
        self.batch, self.seq = micro_batch, config.data.seq_len
        self.tokens = micro_batch * self.seq
        self.query, self.key = (n * model.dim_per_head for n in (model.num_heads, model.kv_heads))
        self.reversible = model.blocks == "revffn"
        self.hidden = self.width(model.hidden_size)
        self.inner = self.width(model.inner_size)
        """What attention and feed-forward layers read and write: `hidden` but in reversible blocks without adapters."""
        self.stream = self.statistics(model.hidden_size // 2)
        """One of the two streams of reversible blocks, `[batch, seq, hidden_size / 2]` in the master dtype."""
        self.mixture = model.ffn == "moe"
        self.copies = model.moe.top_k if self.mixture else 1
        """Rows of the feed-forward layer for each token."""
        self.expert_ffn = self.copies * self.width(model.ffn_size) if self.mixture else 0
        self.linear_ffn = model.moe.shared_size if self.mixture else model.ffn_size
        """Width of the feed-forward layer that is no mixture, or beside it."""
        self.ffn = self.expert_ffn + self.width(self.linear_ffn)
        self.frozen = config.optimizer.only == "adapters"
        """Whether attention and feed-forward layer are not trained."""
        self.fp8, self.holds_casts = config.precision.fp8, True
        """holds_casts: FP8 weights are cast in each forward and kept for backward; otherwise FSDP2 gathers them."""
        recipe = Products(
            self.compute, self.master, fp8=self.fp8, row_scales=config.precision.fp8_scales == "row"
        )
        self.attention_products = replace(recipe, fused=self.cuda if self.fp8 else self.compiled)
        sparse = config.sparse.mode == "s-ste"
        self.ffn_products = replace(
            self.attention_products,
            sparse=sparse,
            mvue=sparse and config.sparse.grad_weight == "mvue",
            fused=self.attention_products.fused and not self.mixture,
        )

    def width(self, columns: int) -> int:
        """`[batch, seq, columns]` in the compute dtype."""
        return self.tokens * columns * self.compute

    def statistics(self, columns: int) -> int:
        """`[batch, seq, columns]` in the master dtype: 1 / RMS of a norm, logsumexp of attention."""
        return self.tokens * columns * self.master

    def wide_norm(self, columns: int) -> int:
        """What a norm of `[batch, seq, columns]` keeps more in half precision on CPUs, where it is not fused.

        Its input and the normed input in fp32, and not the input as it came.
        """
        if self.cuda or self.compute == self.master:
            return 0
        return 2 * self.statistics(columns) - self.width(columns)

    def operand(self, columns: int, layers: int = 1, reads: int = 1) -> int:
        """What `layers` linear layers keep of the `reads` tensors `[batch, seq, columns]` that they read.

        In FP8 each its cast, but for those of a compiled block, which are found to be the same.
        """
        if not self.fp8:
            return reads * self.width(columns)
        return self.tokens * columns * (reads if self.compiled else layers)

    def around_layer(self, compiled: bool, layers: int, canon: bool, reads: int = 1) -> dict[str, int]:
        """What a half keeps around its attention or feed-forward layer, which reads `reads` tensors, each normed.

        layers: its linear layers that read them. canon: a Canon layer lies between.
        """
        model, columns = self.model, normed_width(self.model)
        statistics = reads * self.statistics(1)
        if not self.reversible:
            wide = 0 if compiled else self.wide_norm(columns)
            saved = {"input": self.hidden, "norm": statistics + wide}
        else:  # its input is a stream, which is there; the norm is in the stream's type, which CPUs too have fused
            saved = {"norm": statistics}
            if reads > 1:
                saved["fixed point"] = self.stream  # not the same tensor as the stream that is then rebuilt
        if canon:
            # its result is what is read; it keeps a copy of the normed tensor with three tokens ahead
            ahead = self.batch * (CANON_TAPS - 1) * columns * self.compute
            saved["canon"] = self.width(columns) + ahead
        if self.reversible and model.revffn.adapters:
            saved["normed"] = reads * self.width(columns)
            # what the layer reads, and its result
            saved["adapters"] = self.operand(model.inner_size, layers, reads) + self.inner
        else:
            saved["normed"] = self.operand(columns, layers, reads)
        return saved

    def attention_saved(self) -> dict[str, int]:
        """What the attention half of a block keeps for backward."""
        model, confined = self.model, self.config.data.confine_attention
        # models/attention.py: CUDA's fp32 and masked kernels get a copy of the keys for each query head
        native = not self.cuda or (self.compute == 2 and not confined)
        own_queries = self.reversible and model.coupling == "revffn"
        saved = self.around_layer(self.compiled, 3, "A" in model.canon, reads=2 if own_queries else 1) | {
            "q, k, v": self.width(self.query + 2 * (self.key if native else self.query)),
            "out": self.width(self.query) + self.statistics(model.num_heads),
        }
        if self.fp8:  # beside attention's result, which attention keeps
            saved["cast"] = self.operand(self.query) + self.casts(attention_shapes(model))
        if model.qk_norm:
            heads = self.statistics(model.num_heads + model.kv_heads)
            wide = 0 if self.compiled else self.wide_norm(self.query + self.key)
            saved["q, k before their norm"] = self.width(self.query + self.key) + heads + wide
        if confined:
            saved["mask"] = self.batch * self.seq**2 * self.compute  # sdpa makes numbers of the booleans
        return saved

    def ffn_saved(self) -> dict[str, int]:
        """What the feed-forward half of a block keeps for backward."""
        model, mixture = self.model, self.mixture
        compiled = self.compiled and not mixture  # build.py: around a mixture the attention alone is compiled
        linear = ffn_shapes(model)[4 if mixture else 0 :]
        saved = self.around_layer(compiled, 2 if linear else 0, "C" in model.canon) | {
            "w1, w3, product": 2 * self.ffn + self.product(),
            # the backward kernel of a compiled block computes silu(w1 x) again
            "silu": 0 if compiled else self.ffn,
        }
        if self.fp8:
            saved["cast"] = self.casts(linear)
            if mixture and self.compute == self.master:
                saved["normed of the router"] = self.inner  # which otherwise is the shared expert's
        if mixture:
            experts, rows = model.moe.experts, self.copies * self.tokens
            sorting = 2 if self.config.parallel.experts > 1 else 0  # where rows have come from, and go back
            saved |= {
                # the copies that go to the experts, and what comes back, which the scores multiply
                "rows": (1 if self.frozen else 2) * self.copies * self.inner,
                # logits, scores, their product with the valid tokens, and the input in fp32
                "router": 4 * self.statistics(experts)
                + (0 if self.compute == self.master else self.statistics(self.model.inner_size)),
                "indices": 8 * (3 + sorting) * rows,
            }
        return saved

    def product(self) -> int:
        """silu(w1 x) * w3 x, as w2 keeps it for the gradient of its weight."""
        if self.frozen:
            return 0
        return self.expert_ffn + self.operand(self.linear_ffn)

    def casts(self, shapes: tuple[Shape, ...]) -> int:
        """The 8-bit weights of linear layers, from forward to backward."""
        return Group(shapes).numel if self.fp8 and self.holds_casts else 0

    def ffn_product(self, reads: int, makes: int) -> int:
        """What the backward of one of the feed-forward layer's products takes for a moment."""
        if not self.mixture:
            return self.ffn_products.backward(self.tokens, reads, makes)
        stack = 0 if self.frozen else Group(ffn_shapes(self.model, self.config.parallel.experts)[1:2]).numel
        return self.ffn_products.stacked_backward(self.copies * self.tokens, reads, makes, stack)

    def saved(self) -> int:
        """What the backward of one block needs."""
        return sum(self.attention_saved().values()) + sum(self.ffn_saved().values())

    def kept(self) -> int:
        """What of it lives from a block's forward to its backward; the rest is recomputed."""
        if self.reversible:  # the experts of each token, int64, which the recompute repeats
            return 8 * self.tokens * self.copies if self.model.ffn == "moe" else 0
        if self.config.run.recompute == "none":
            return self.saved()
        if self.config.run.recompute == "full":
            return self.hidden
        # the results of attention and of the products (run/build.py), wo's and w2's among them
        products = self.width(self.query + 2 * self.key) + 2 * self.ffn + 2 * self.hidden
        return self.hidden + self.attention_saved()["out"] + products

    def anchors(self, layer: int) -> int:
        """The two streams kept behind reversible block `layer`, from which backward rebuilds those before it."""
        if not self.reversible:
            return 0
        every = self.model.revffn.anchor_every or self.model.num_layers
        return 2 * self.stream if layer == self.model.num_layers - 1 or (layer + 1) % every == 0 else 0

    def inverting(self) -> int:
        """Beside what a reversible half has recomputed: its result, as steps of the grid too, and the stream before."""
        rounded = self.stream if self.model.revffn.streams == "grid" else 0
        return self.width(self.model.hidden_size // 2) + rounded + self.stream

    def tables(self) -> int:
        """Rotary tables, and the boolean mask of confined attention: once for all blocks."""
        entries, mask = self.seq, 0
        if self.config.data.confine_attention:
            entries, mask = self.tokens, self.batch * self.seq**2
        return 2 * entries * self.model.dim_per_head * self.master + mask

    def loss_chunk(self, logits_at_once: int) -> int:
        """What kernels/cross_entropy.py takes for its chunks of `logits_at_once` logits.

        A chunk's tensors are dropped before the next one. On CPUs softmax is in place; on CUDA there are logits and
        softmax in fp32. Half precision adds the product, then the gradient.
        """
        vocab = self.model.vocab_size
        rows = min(self.tokens, max(128, logits_at_once // vocab // 128 * 128))
        half = 0 if self.compute == self.master else self.compute
        softmax = rows * vocab * (2 if self.cuda else 1) * self.master
        # a chunk's part of the head's gradient before it is added in fp32, to which CPUs convert it first
        part = half + self.master if half and not self.cuda else half
        gradient = rows * vocab * (self.master + half) + vocab * self.model.hidden_size * part
        return max(softmax, gradient)
