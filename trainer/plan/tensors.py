"""The parameters of a model by shape, and how they are grouped and cut. Imports no torch."""

import math
from collections import Counter
from dataclasses import dataclass

from stepline.models.config import CANON_TAPS, ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Parameters that are gathered and reduced together."""

    shapes: tuple[Shape, ...]
    narrow: tuple[Shape, ...] = ()
    """Those of them that are gathered in 8 bits."""
    dealt: bool = False
    """Experts that a rank shares with fewer ranks than the rest."""
    frozen: tuple[Shape, ...] = ()
    """Those of them that are not trained."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    def shard(self, ranks: int) -> int:
        """Elements that one of `ranks` holds: equal chunks of dimension 0, the last ones padded (FSDP2)."""
        return sum(math.prod(local_shape(shape, ranks)) for shape in self.shapes)

    @property
    def trained(self) -> "Group":
        """Those that have a gradient, in their order; of equal ones the last are frozen."""
        left, found = Counter(self.frozen), []
        for shape in reversed(self.shapes):
            if left[shape]:
                left[shape] -= 1
            else:
                found.append(shape)
        return Group(tuple(reversed(found)), dealt=self.dealt)

    def wide_shard(self, ranks: int) -> int:
        """Of `shard` what is gathered in the compute dtype."""
        return self.shard(ranks) - Group(self.narrow).shard(ranks)

    def flat(self, ranks: int, item: int) -> int:
        """Bytes of the gathered shards, `item` for an element."""
        return ranks * (self.wide_shard(ranks) * item + Group(self.narrow).shard(ranks))

    def gathered(self, item: int) -> int:
        """Bytes of the gathered parameters."""
        narrow = Group(self.narrow).numel
        return (self.numel - narrow) * item + narrow

    def matrices(self) -> list[Shape]:
        """The parameters with two dimensions, and each matrix of those with three."""
        stacks = [shape[1:] for shape in self.shapes if len(shape) == 3 for _ in range(shape[0])]
        return [shape for shape in self.shapes if len(shape) == 2] + stacks


def local_shape(shape: Shape, ranks: int) -> Shape:
    """What one of `ranks` holds of a parameter, filled up to what the first one does.

    comm/fsdp.py: stacks of matrices that the ranks do not divide are cut by row where they divide that.
    """
    if len(shape) == 3 and shape[0] % ranks and shape[1] % ranks == 0:
        return (shape[0], shape[1] // ranks, shape[2])
    return (-(-shape[0] // ranks), *shape[1:])


def root_group(model: ModelConfig, adapters_alone: bool = False) -> Group:
    """Embedding, final norm and head; adapters_alone: none of them is trained."""
    table = (model.vocab_size, model.hidden_size)
    shapes = (table, table[1:], *(() if model.tied_embeddings else (table,)))
    return Group(shapes, frozen=shapes if adapters_alone else ())


def block_group(model: ModelConfig, adapters_alone: bool = False) -> Group:
    """One block, in the order of its modules; adapters_alone: attention and feed-forward layer are frozen."""
    width, head = normed_width(model), model.dim_per_head
    attention = (*attention_shapes(model), *(((head,), (head,)) if model.qk_norm else ()))
    reversible = model.blocks == "revffn"
    full, adapted = model.hidden_size, reversible and model.revffn.adapters
    adapter = ((full, width), (width, full)) if adapted else ()
    before, after = ((((CANON_TAPS * width,),) if place in model.canon else ()) for place in ("A", "C"))
    norms = ((width,),) * (2 if reversible and model.coupling == "revffn" else 1)
    return Group(
        (*norms, *adapter, *before, *attention, (width,), *adapter, *after, *ffn_shapes(model)),
        frozen=(*attention, *ffn_shapes(model)) if adapters_alone else (),
    )


def trained_groups(model: ModelConfig, adapters_alone: bool = False) -> tuple[Group, Group]:
    """What is trained of the root's, and of all blocks'."""
    root, block = root_group(model, adapters_alone), block_group(model, adapters_alone)
    return root.trained, Group(block.trained.shapes * model.num_layers)


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


def ffn_shapes(model: ModelConfig, parts: int = 1) -> tuple[Shape, ...]:
    """The feed-forward layer's parameters: a SwiGLU's, or router, one of `parts` of the experts, and shared expert."""
    dim, ffn = model.inner_size, model.ffn_size
    if model.ffn == "dense":
        return ((ffn, dim), (ffn, dim), (dim, ffn))
    experts, shared = model.moe.experts, model.moe.shared_size
    always = ((shared, dim), (shared, dim), (dim, shared)) if shared else ()
    held = experts // parts
    return ((experts, dim), (held, ffn, dim), (held, ffn, dim), (held, dim, ffn), *always)
