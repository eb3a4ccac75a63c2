"""Gathering a sharded parameter as something narrower that was made of its shards, by FSDP2's extension points.

FSDP2 asks the local tensor of a parameter for `fsdp_pre_all_gather` and `fsdp_post_all_gather`. Here they gather
`shard`, which the caller makes after each update, in place of the parameter. What is gathered goes to `receive`; the
module's parameter becomes a placeholder of its shape and type that takes up no memory, is NaN throughout, and gets the
gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard


class _Placeholder(Tensor):
    """One NaN. FSDP2 lays its own strides over what an extension hands it, which one value cannot carry: it is expanded
    instead."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        plain = tuple(a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args)
        if function is torch.as_strided:
            return plain[0].expand(args[1])
        return function(*plain, **(kwargs or {}))


class CastShard:
    """What is gathered in place of the shards of `parameter`, which are cut along its first dimension."""

    def __init__(self, parameter: DTensor, receive: Callable[[Tensor], None]) -> None:
        """receive: gets the gathered tensor, `[rows, ...]`, once; its storage is FSDP's, freed and filled again."""
        if parameter.placements[-1] != Shard(0):
            raise ValueError("only shards of the first dimension are gathered in another type")
        self.shape, self.receive = parameter.shape, receive
        self.shard: Tensor | None = None
        """This rank's part, of the parameter's local shape, in the type that is gathered."""
        self.group = parameter.device_mesh.get_group(parameter.device_mesh.ndim - 1)
        local = parameter._local_tensor
        local.fsdp_pre_all_gather, local.fsdp_post_all_gather = self.before, self.after

    def before(
        self, mesh: DeviceMesh, size: torch.Size, stride: tuple[int, ...], module: nn.Module,
        policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[Tensor, ...], None]:  # fmt: skip
        """FSDP2's fsdp_pre_all_gather: the shard, filled up to the same size on every rank."""
        if self.shard is None:
            raise RuntimeError("a weight is gathered before its shards were cast")
        missing = -(-size[0] // mesh.size()) - len(self.shard)
        return (
            torch.cat([self.shard, self.shard.new_zeros(missing, *size[1:])]) if missing else self.shard,
        ), None

    def after(
        self, gathered: tuple[Tensor, ...], _: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """FSDP2's fsdp_post_all_gather: nothing is copied."""
        if out is not None:
            return None
        self.receive(gathered[0][: self.shape[0]])
        nothing = torch.full((1,) * len(self.shape), torch.nan, dtype=dtype, device=gathered[0].device)
        return nothing.as_subclass(_Placeholder), ()
