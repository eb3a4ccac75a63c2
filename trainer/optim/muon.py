"""Muon: orthogonalised momentum for the matrices of the blocks, exact on sharded parameters.

Each rank keeps the momentum of its own rows. For the orthogonalisation, which needs whole matrices, one
all-to-all gives every rank whole matrices of its own (the work is split, nothing is computed twice inside a
replica) and a second one brings the rows of the updates back.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from stepline.comm.fsdp import local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
BUCKET_ELEMENTS = 1 << 27  # elements a rank exchanges at once: bounds the memory beside the parameters


def newton_schulz(matrices: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Brings the singular values of each matrix near 1, its singular vectors kept.

    matrices: [batch, rows, cols]. The quintic iteration X <- aX + (bA + cA^2)X, A = XX^T, from
    X = G / |G|_F (Jordan et al., https://kellerjordan.github.io/posts/muon; arXiv 2502.16982, eq. 2).
    """
    a, b, c = COEFFICIENTS
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide).clamp_min(eps)
    x = (x / norm).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x.mT if tall else x


def update_scale(rows: int, cols: int) -> float:
    """0.2 sqrt(max(rows, cols)): the RMS of AdamW's updates, so that its learning rate and weight decay
    transfer (arXiv 2502.16982, eq. 4)."""
    return 0.2 * max(rows, cols) ** 0.5


def shard_rows(rows: int, ranks: int) -> list[int]:
    """Rows that each rank holds of a matrix sharded over dimension 0 (torch.chunk's division)."""
    chunk = -(-rows // ranks)
    return [max(0, min(chunk, rows - rank * chunk)) for rank in range(ranks)]


@dataclass
class Bucket:
    """Matrices that are exchanged together, and the rank that orthogonalises each of them."""

    names: list[str]
    owners: list[int]


class Muon:
    """Muon for matrices `[rows, cols]` and stacks of them `[experts, rows, cols]`: plain tensors, or DTensors that are
    sharded by dimension 0."""

    def __init__(
        self,
        params: dict[str, nn.Parameter],
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> None:
        self.params = params
        self.momentum, self.nesterov = momentum, nesterov
        self.buffers = {name: torch.zeros_like(p, requires_grad=False) for name, p in params.items()}
        self.orthogonal = Orthogonalizer(params, ns_steps)

    def state(self) -> dict[str, Tensor]:
        """The live momentum of each parameter, sharded as the parameter is."""
        return {f"{name}.momentum": buffer for name, buffer in self.buffers.items()}

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float, skip: Tensor | None = None) -> None:
        """One update with decoupled weight decay; where `skip` (0-dim) is 1 nothing at all changes."""
        for name, update in self.orthogonal.updates(lambda name: self._direction(name, skip)):
            param = local(self.params[name])
            new = param * (1 - lr * weight_decay)
            new.add_(update, alpha=-lr)
            param.copy_(new if skip is None else torch.where(skip > 0, param, new))

    def _direction(self, name: str, skip: Tensor | None) -> Tensor:
        """This rank's rows of the momentum after this gradient (Nesterov's look-ahead if asked for)."""
        param, buffer = self.params[name], local(self.buffers[name])
        if param.grad is None:
            raise RuntimeError(f"parameter {name} has no gradient; Muon updates every matrix in every step")
        grad = local(param.grad)
        if skip is not None:
            grad = torch.where(skip > 0, buffer, grad)  # lerp towards itself leaves the momentum as it is
        buffer.lerp_(grad, 1 - self.momentum)
        return grad.lerp(buffer, self.momentum) if self.nesterov else buffer


class Orthogonalizer:
    """Makes updates of the RMS of AdamW's from the momenta of matrices of which each rank holds some rows, or of
    stacks of which it holds some matrices."""

    def __init__(self, params: Mapping[str, nn.Parameter], ns_steps: int = 5) -> None:
        self.params, self.ns_steps = params, ns_steps
        self._stacks = [name for name, param in params.items() if param.ndim == 3]
        for name in self._stacks:
            _check_whole(name, params[name])
        matrices = {name: param for name, param in params.items() if name not in self._stacks}
        self._groups = [(group, _buckets(params, names, group)) for group, names in _by_group(matrices)]

    def updates(self, direction: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, this rank's part of the update) of each parameter; direction: its part of a momentum, by name.

        A collective of the ranks that shard a matrix; a stack's matrices are whole where they are.
        """
        for name in self._stacks:
            stack = _narrow(direction(name))
            at_once = max(1, BUCKET_ELEMENTS // max(1, stack[0].numel())) if len(stack) else 1
            done = [newton_schulz(part, self.ns_steps) for part in stack.split(at_once) if len(part)]
            update = torch.cat(done) if done else stack
            yield name, update.to(self.params[name].dtype) * update_scale(*stack.shape[1:])
        for group, buckets in self._groups:
            for bucket in buckets:
                rows = [_narrow(direction(name)) for name in bucket.names]
                shapes = [tuple(self.params[name].shape) for name in bucket.names]
                updates = orthogonalize(rows, shapes, bucket.owners, group, self.ns_steps)
                for name, shape, update in zip(bucket.names, shapes, updates, strict=True):
                    yield name, update.to(self.params[name].dtype) * update_scale(*shape)


def _narrow(direction: Tensor) -> Tensor:
    """bf16 is what the tensor cores want, and halves the exchange; CPUs emulate it slowly."""
    return direction.bfloat16() if direction.is_cuda and direction.dtype == torch.float32 else direction


def orthogonalize(
    shards: list[Tensor],
    shapes: list[tuple[int, int]],
    owners: list[int],
    group: dist.ProcessGroup | None,
    steps: int,
) -> list[Tensor]:
    """This rank's rows of the orthogonalised matrices.

    shards[i] holds this rank's rows of matrix i, [local_rows, cols]; shapes[i] is its global shape; owners[i]
    is the rank of `group` that computes it. Without a group the shards are whole.
    """
    if group is None:
        return _whole(shards, steps)
    ranks, me = dist.get_world_size(group), dist.get_rank(group)
    by_owner = [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(ranks)]
    rows = [shard_rows(shape[0], ranks) for shape in shapes]
    outgoing = [sum(shards[i].numel() for i in by_owner[rank]) for rank in range(ranks)]
    incoming = [sum(rows[i][rank] * shapes[i][1] for i in by_owner[me]) for rank in range(ranks)]

    sent = torch.cat([shards[i].reshape(-1) for rank in range(ranks) for i in by_owner[rank]])
    received = sent.new_empty(sum(incoming))
    dist.all_to_all_single(received, sent, incoming, outgoing, group=group)

    # Received in order of source rank, and within it in order of matrix.
    sizes = [rows[i][rank] * shapes[i][1] for rank in range(ranks) for i in by_owner[me]]
    pieces, mine = received.split(sizes), len(by_owner[me])
    whole = [torch.cat(pieces[k::mine]).view(shapes[i]) for k, i in enumerate(by_owner[me])]
    done = [u.split(rows[i]) for u, i in zip(_whole(whole, steps), by_owner[me], strict=True)]
    back = [u[rank].reshape(-1) for rank in range(ranks) for u in done]
    returned = torch.empty_like(sent)
    dist.all_to_all_single(returned, torch.cat(back) if back else received, outgoing, incoming, group=group)

    order = [i for rank in range(ranks) for i in by_owner[rank]]
    flat = dict(zip(order, returned.split([shards[i].numel() for i in order]), strict=True))
    return [flat[i].view_as(shard) for i, shard in enumerate(shards)]


def _whole(matrices: list[Tensor], steps: int) -> list[Tensor]:
    """Newton-Schulz of whole matrices, those of one shape as one batched product."""
    by_shape: dict[torch.Size, list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(i)
    results: dict[int, Tensor] = {}
    for indices in by_shape.values():
        stacked = newton_schulz(torch.stack([matrices[i] for i in indices]), steps)
        results.update(zip(indices, stacked, strict=True))
    return [results[i] for i in range(len(matrices))]


def _shard_group(name: str, param: nn.Parameter) -> dist.ProcessGroup | None:
    """The group over which the rows are sharded; None when this rank holds the whole matrix."""
    if not isinstance(param, DTensor):
        return None
    sharded = [dim for dim, placement in enumerate(param.placements) if placement != Replicate()]
    if not sharded:
        return None
    if len(sharded) > 1 or param.placements[sharded[0]] != Shard(0):
        raise ValueError(f"Muon needs {name} sharded by rows over one mesh dimension, not {param.placements}")
    group = param.device_mesh.get_group(sharded[0])
    return group if dist.get_world_size(group) > 1 else None


def _check_whole(name: str, param: nn.Parameter) -> None:
    """Raises ValueError where a stack's matrices are cut."""
    placements = param.placements if isinstance(param, DTensor) else ()
    if any(getattr(placement, "dim", 0) != 0 for placement in placements):  # a strided shard has one too
        raise ValueError(f"Muon needs the matrices of {name} whole, not {placements}")


def _by_group(params: Mapping[str, nn.Parameter]) -> list[tuple[dist.ProcessGroup | None, list[str]]]:
    """Parameters by the group and the dtype that they are exchanged in, in the order of their names."""
    found: dict[tuple, tuple[dist.ProcessGroup | None, list[str]]] = {}
    for name, param in params.items():
        if param.ndim != 2:
            raise ValueError(f"Muon updates matrices; {name} has shape {tuple(param.shape)}")
        group = _shard_group(name, param)
        key = (None if group is None else group.group_name, param.dtype, param.device)
        found.setdefault(key, (group, []))[1].append(name)
    return list(found.values())


def _buckets(
    params: Mapping[str, nn.Parameter], names: list[str], group: dist.ProcessGroup | None
) -> list[Bucket]:
    """Cuts `names` into buckets, and deals the matrices of each to the ranks so that their work is even."""
    ranks = 1 if group is None else dist.get_world_size(group)
    # Same shapes side by side, so that they meet in one bucket and one batched product.
    names = sorted(names, key=lambda name: tuple(params[name].shape))
    limit, filled, cut = BUCKET_ELEMENTS * ranks, 0, [[]]
    for name in names:
        if cut[-1] and filled + params[name].numel() > limit:
            cut.append([])
            filled = 0
        cut[-1].append(name)
        filled += params[name].numel()
    return [Bucket(bucket, _deal([tuple(params[n].shape) for n in bucket], ranks)) for bucket in cut]


def _deal(shapes: list[tuple[int, int]], ranks: int) -> list[int]:
    """An owner for each matrix: the costliest first, each to the rank with the least work so far."""
    cost = [rows * cols * min(rows, cols) for rows, cols in shapes]
    load, owners = [0] * ranks, [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: (-cost[i], i)):
        owners[i] = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[owners[i]] += cost[i]
    return owners
