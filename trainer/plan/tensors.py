"""Sizes of the tensors of a training step, counted from shapes. Imports no torch."""

import math
from dataclasses import dataclass

from stepline.models.config import CANON_TAPS, ModelConfig
from stepline.trainer.config import Config

ITEM_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Parameters that are gathered and reduced together."""

    shapes: tuple[Shape, ...]

    @property
    def numel(self) -> int:
        """Elements of the whole parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    def shard(self, ranks: int) -> int:
        """Elements that one of `ranks` holds: equal chunks of dimension 0, the last ones padded (FSDP2)."""
        return sum(_shard(shape, ranks) for shape in self.shapes)

    def matrices(self) -> list[Shape]:
        """The parameters with two dimensions, and each matrix of those with three."""
        stacks = [shape[1:] for shape in self.shapes if len(shape) == 3 for _ in range(shape[0])]
        return [shape for shape in self.shapes if len(shape) == 2] + stacks


def _shard(shape: Shape, ranks: int) -> int:
    """comm/fsdp.py: stacks of matrices that the ranks do not divide are cut by row where they divide that."""
    size = math.prod(shape)
    if len(shape) == 3 and shape[0] % ranks and shape[1] % ranks == 0:
        return size // ranks
    return -(-shape[0] // ranks) * (size // shape[0])


def root_group(model: ModelConfig) -> Group:
    """Embedding, final norm and head."""
    table = (model.vocab_size, model.hidden_size)
    return Group((table, table[1:], *(() if model.tied_embeddings else (table,))))


def block_group(model: ModelConfig) -> Group:
    """One block, in the order of its modules."""
    dim, head = model.inner_size, model.dim_per_head
    norms = ((head,), (head,)) if model.qk_norm else ()
    attention = (*attention_shapes(model), *norms)
    canon = ((CANON_TAPS * normed_width(model),),) * sum(place in model.canon for place in "AC")
    if model.blocks == "standard":
        return Group(((dim,), *canon, *attention, (dim,), *ffn_shapes(model)))
    full, stream = model.hidden_size, model.hidden_size // 2
    adapter = ((full, stream), (stream, full)) if model.revffn.adapters else ()
    norms = ((stream,),) * (3 if model.coupling == "revffn" else 2)
    return Group((*norms, *canon, *adapter, *attention, *adapter, *ffn_shapes(model)))


def normed_width(model: ModelConfig) -> int:
    """Width of what a block's norms read: the hidden one, or a stream's."""
    return model.hidden_size // (2 if model.blocks == "revffn" else 1)


def cast_group(model: ModelConfig) -> Group:
    """One block's parameters that FSDP2 gathers in FP8 (run/sparsity.py): no experts, router, adapters and norms."""
    ffn = ffn_shapes(model)
    return Group((*attention_shapes(model), *(ffn if model.ffn == "dense" else ffn[4:])))


def attention_shapes(model: ModelConfig) -> tuple[Shape, ...]:
    """The matrices of attention."""
    dim, query, key = model.inner_size, *(n * model.dim_per_head for n in (model.num_heads, model.kv_heads))
    return ((query, dim), (key, dim), (key, dim), (dim, query))


def ffn_shapes(model: ModelConfig) -> tuple[Shape, ...]:
    """The feed-forward layer's parameters: a SwiGLU's, or router, experts and shared expert."""
    dim, ffn = model.inner_size, model.ffn_size
    if model.ffn == "dense":
        return ((ffn, dim), (ffn, dim), (dim, ffn))
    experts, shared = model.moe.experts, model.moe.shared_size
    always = ((shared, dim), (shared, dim), (dim, shared)) if shared else ()
    return ((experts, dim), (experts, ffn, dim), (experts, ffn, dim), (experts, dim, ffn), *always)


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
        mixture = model.ffn == "moe"
        self.copies = model.moe.top_k if mixture else 1
        """Rows of the feed-forward layer for each token."""
        self.ffn = self.copies * self.width(model.ffn_size) + self.width(
            model.moe.shared_size if mixture else 0
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

    def around_layer(self, compiled: bool, reads: int = 1) -> dict[str, int]:
        """What a half keeps around its attention or feed-forward layer, which reads `reads` tensors, each normed."""
        if not self.reversible:
            wide = 0 if compiled else self.wide_norm(self.model.hidden_size)
            return {"input": self.hidden, "normed": self.hidden + self.statistics(1) + wide}
        # its input is a stream, which is there; the norm is in the stream's type, which CPUs too have fused
        saved = {"normed": reads * (self.width(self.model.hidden_size // 2) + self.statistics(1))}
        if reads > 1:
            saved["fixed point"] = self.stream  # not the same tensor as the stream that is then rebuilt
        if self.model.revffn.adapters:
            saved["adapters"] = (reads + 1) * self.inner  # what the layer reads, and its result
        return saved

    def canon(self) -> int:
        """What a Canon layer adds: its result, which the layer behind it reads; and three tokens ahead of the normed
        tensor, in whose place the copy with them is kept."""
        ahead = self.batch * (CANON_TAPS - 1) * normed_width(self.model) * self.compute
        return self.width(normed_width(self.model)) + ahead

    def attention_saved(self) -> dict[str, int]:
        """What the attention half of a block keeps for backward."""
        model, confined = self.model, self.config.data.confine_attention
        # models/attention.py: CUDA's fp32 and masked kernels get a copy of the keys for each query head
        native = not self.cuda or (self.compute == 2 and not confined)
        own_queries = self.reversible and model.coupling == "revffn"
        saved = self.around_layer(self.compiled, reads=2 if own_queries else 1) | {
            "q, k, v": self.width(self.query + 2 * (self.key if native else self.query)),
            "out": self.width(self.query) + self.statistics(model.num_heads),
        }
        if "A" in model.canon:
            saved["canon"] = self.canon()
        if model.qk_norm:
            heads = self.statistics(model.num_heads + model.kv_heads)
            wide = 0 if self.compiled else self.wide_norm(self.query + self.key)
            saved["q, k before their norm"] = self.width(self.query + self.key) + heads + wide
        if confined:
            saved["mask"] = self.batch * self.seq**2 * self.compute  # sdpa makes numbers of the booleans
        return saved

    def ffn_saved(self) -> dict[str, int]:
        """What the feed-forward half of a block keeps for backward."""
        mixture = self.model.ffn == "moe"
        compiled = self.compiled and not mixture  # build.py: around a mixture the attention alone is compiled
        saved = self.around_layer(compiled) | {
            "w1, w3, product": 3 * self.ffn,
            # the backward kernel of a compiled block computes silu(w1 x) again
            "silu": 0 if compiled else self.ffn,
        }
        if "C" in self.model.canon:
            saved["canon"] = self.canon()
        if mixture:
            experts, rows = self.model.moe.experts, self.copies * self.tokens
            saved |= {
                # the copies that go to the experts, and what comes back, which the scores multiply
                "rows": 2 * self.copies * self.inner,
                # logits, scores, their product with the valid tokens, and the input in fp32
                "router": 4 * self.statistics(experts)
                + (0 if self.compute == self.master else self.statistics(self.model.inner_size)),
                "indices": 8 * (3 * rows),
            }
        return saved

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
