"""Expert parallelism: each rank of an `ep` group holds some of the experts, and rows travel to them and back."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from stepline.comm.fsdp import local

Back = Callable[[Tensor], Tensor]


def expert_mesh(mesh: DeviceMesh, degree: int) -> DeviceMesh:
    """`("replicate", "shard_mod_ep", "ep")` of a mesh `("replicate", "shard")`: neighbouring ranks share experts.

    Raises ValueError when `degree` does not divide the ranks that shard a replica.
    """
    shard = mesh["shard"].size()
    if shard % degree:
        raise ValueError(f"{degree} parts of the experts do not divide the {shard} ranks of a replica")
    return mesh._unflatten(1, (shard // degree, degree), ("shard_mod_ep", "ep"))


class ExpertExchange:
    """The all-to-all between the ranks of `group`, of which each holds `experts` / ranks consecutive experts."""

    def __init__(self, group: dist.ProcessGroup, experts: int) -> None:
        self.group, self.ranks = group, dist.get_world_size(group)
        if experts % self.ranks:
            raise ValueError(f"{experts} experts cannot be dealt to {self.ranks} ranks")
        self.own = experts // self.ranks

    def to_owners(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Back]:
        """Sends rows `[rows, width]`, sorted by expert, to the ranks that hold their experts; a collective.

        counts: `[experts]` int64, rows of each. Returns what came, sorted by own expert, the counts `[own experts]`,
        and the way back for rows of the same order.
        """
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self.group)
        theirs = theirs.view(self.ranks, self.own)  # by source and own expert
        send, receive = torch.stack([counts.view(self.ranks, -1).sum(1), theirs.sum(1)]).tolist()
        came = _AllToAll.apply(rows, send, receive, self.group)
        expert = torch.arange(self.own, device=rows.device).repeat(self.ranks)
        order = expert.repeat_interleave(theirs.flatten(), output_size=sum(receive)).argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)

        def back(results: Tensor) -> Tensor:
            return _AllToAll.apply(results.index_select(0, place), receive, send, self.group)

        return came.index_select(0, order), theirs.sum(0), back

    @staticmethod
    def own_weight(weight: Tensor) -> Tensor:
        """This rank's experts `[own experts, ...]` of a weight, as they are in a forward."""
        return local(weight)


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks of a group: `send[r]` of them to rank r, `receive[r]` from it."""

    @staticmethod
    def forward(ctx, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(rows, send, receive, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    came = rows.new_empty(sum(receive), rows.shape[1])
    dist.all_to_all_single(came, rows.contiguous(), receive, send, group=group)
    return came


def place_experts(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Cuts the experts' weights `[experts, ...]` over `mesh["ep"]`, before FSDP cuts what is left; in place."""
    for name, weight in list(experts.named_parameters(recurse=False)):
        cut = distribute_tensor(weight.data, mesh["ep"], [Shard(0)], src_data_rank=None)
        setattr(experts, name, nn.Parameter(cut, requires_grad=weight.requires_grad))
    experts.exchange = ExpertExchange(mesh["ep"].get_group(), len(weight))
