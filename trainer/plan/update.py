"""Bytes of the optimizers: their state, and what Muon's update takes for a moment. Imports no torch."""

from collections import Counter

from stepline.trainer.plan.tensors import Group, Shape

BUCKET_ELEMENTS = 2**27
"""Of optim/muon.py, which imports torch."""


def adamw_state(root: Group, blocks: Group, shard: int, item: int, moments: int = 2) -> int:
    """So many moments for each element that a rank holds, and a counter in fp32 for each parameter."""
    elements = root.shard(shard) + blocks.shard(shard)
    return moments * item * elements + 4 * len(root.shapes + blocks.shapes)


def muon_state(root: Group, blocks: Group, shard: int, item: int, moments: int = 2) -> int:
    """One momentum for the blocks' matrices, AdamW's state for the rest."""
    vectors = Group(tuple(shape for shape in blocks.shapes if len(shape) < 2))
    momentum = Group(tuple(blocks.matrices())).shard(shard) * item
    return momentum + adamw_state(root, vectors, shard, item, moments)


def muon_temporaries(blocks: Group, shard: int, item: int, master: int) -> int:
    """Most bytes that Muon's update holds beside its state (optim/muon.py), `item` bytes an element.

    blocks: the parameters of all blocks.
    """
    peak = before = 0
    for shapes in _buckets(blocks.matrices(), BUCKET_ELEMENTS * shard):
        mine = Group(tuple(shapes)).shard(shard) * item  # this rank's rows of every matrix
        here = before + mine
        peak = max(peak, here + _orthogonalize(Counter(shapes), mine, shard, item))
        largest = max((Group((shape,)).shard(shard) for shape in shapes), default=0) * master
        peak = max(peak, here + mine + 2 * largest)  # rows, updates, and a parameter's new value
        before = 2 * mine  # lives until the next bucket's replace it
    return peak


def _orthogonalize(shapes: Counter[Shape], mine: int, shard: int, item: int) -> int:
    """Beside this rank's rows: the exchange (where sharded) and Newton-Schulz, shape by shape."""
    # a rank computes its share of the whole matrices
    owned = {shape: -(-count // shard) for shape, count in shapes.items()}
    whole = sum(count * shape[0] * shape[1] for shape, count in owned.items()) * item
    exchange = 0 if shard == 1 else mine + 2 * whole  # sent, received, and joined to matrices
    peak = done = 0
    for (rows, cols), count in owned.items():
        size, gram = count * rows * cols * item, count * min(rows, cols) ** 2 * item
        # the stacked matrices and two iterates with gram and polynomial, or one with two grams
        peak = max(peak, exchange + done + max(3 * size + 2 * gram, 2 * size + 3 * gram))
        done += size
    if shard == 1:
        return peak
    pieces = sum(n * r * c for (r, c), n in owned.items() if r > c) * item  # of transposed results: copies
    back = exchange + done + pieces + whole + mine
    return max(peak, back)


def _buckets(matrices: list[Shape], limit: int) -> list[list[Shape]]:
    cut: list[list[Shape]] = [[]]
    filled = 0
    for rows, cols in sorted(matrices):
        if cut[-1] and filled + rows * cols > limit:
            cut.append([])
            filled = 0
        cut[-1].append((rows, cols))
        filled += rows * cols
    return cut
