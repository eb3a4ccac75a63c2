"""FSDP2 sharding of a model handed over as a list of blocks, with sums instead of means over ranks."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

ONE_GROUP_BYTES = 16 * 2**20
"""Parameters that are gathered at once where they stay gathered: below this, latency costs more than bandwidth."""


def shard_model(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
    replicate: bool = True,
    experts: Iterable[nn.Module] = (),
    expert_mesh: DeviceMesh | None = None,
    keep_matrices: bool = False,
) -> None:
    """`fully_shard` on each block, then on the root (embedding, final norm, head), in place.

    Gradients are SUMMED over all ranks in `reduce_dtype`: the loss is divided by the global number of valid
    tokens before backward, so that ranks with fewer tokens weigh less. FSDP's own mean would not do that;
    gloo has no pre-multiplied sum, hence `set_force_sum_reduction_for_comms` with a divide factor of 1.

    A mesh of one replica becomes its shard dimension (FSDP), otherwise both dimensions are used (HSDP); without
    `replicate` the replicas are left to a synchroniser, and gradients are summed over the ranks of one alone.

    A small model whose parameters stay gathered anyway is one group: one collective each way, not one a block.

    experts: modules whose parameters lie on `expert_mesh["ep"]` already: they are sharded over the ranks that hold the
    same experts.

    Stacks of matrices are cut into matrices, or by row where that comes out even and the other does not; by matrix
    always with `keep_matrices`, as an optimizer may need them whole.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if not reshard_after_forward and size <= ONE_GROUP_BYTES:
        blocks = ()
    replicate = replicate and mesh["replicate"].size() > 1
    mesh = mesh if replicate else mesh["shard"]
    # Inputs are left as they are: the blocks' rotary tables stay in fp32, and the rest has the compute type already.
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    for module in experts:
        cut = expert_mesh["replicate", "shard_mod_ep"] if replicate else expert_mesh["shard_mod_ep"]
        place = _stacks(expert_mesh["shard_mod_ep"].size(), keep_matrices)
        fully_shard(
            module, mesh=cut, mp_policy=policy, reshard_after_forward=reshard_after_forward, shard_placement_fn=place
        )  # fmt: skip
    place = _stacks(mesh.size(-1) if mesh.ndim > 1 else mesh.size(), keep_matrices)
    for block in blocks:
        fully_shard(
            block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward, shard_placement_fn=place
        )  # fmt: skip
    # The root's parameters are used at both ends of the step: they stay gathered between forward and backward.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False, shard_placement_fn=place)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            if mesh.size() > 1:  # one rank would divide by it, in a buffer of its own
                module.set_gradient_divide_factor(1.0)


def _stacks(ranks: int, keep_matrices: bool) -> Callable[[nn.Parameter], Shard | None]:
    """Stacks of matrices are cut into matrices; by row where `ranks` divide the rows and not the matrices."""

    def place(parameter: nn.Parameter) -> Shard | None:
        if parameter.ndim < 3 or keep_matrices:
            return None
        matrices, rows = local(parameter).shape[:2]
        return Shard(1) if matrices % ranks and rows % ranks == 0 else None

    return place


def forget_gathered(model: nn.Module) -> None:
    """Drops gathered parameters, which FSDP2 may keep from one forward to the next, after the shards were changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def all_reduce_on_last(model: nn.Module, last: bool) -> None:
    """Under HSDP, reduce over the replicas only in the last micro-batch; shards are reduced in each one."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
        _widen_sums(model)


def _widen_sums(model: nn.Module) -> None:
    """What a replica's ranks have summed over micro-batches goes on in the parameters' type.

    HSDP keeps it in the reduce dtype: in bf16 each micro-batch would round it again. On the stream that adds to it.
    """
    for module in model.modules():
        state = module._get_fsdp_state() if isinstance(module, FSDPModule) else None
        for group in getattr(state, "_fsdp_param_groups", [getattr(state, "_fsdp_param_group", None)]):
            total = None if group is None else group._partial_reduce_output
            if total is not None and total.dtype != group._orig_dtype:
                with group.device_handle.stream(group.comm_ctx.reduce_scatter_stream):
                    group._partial_reduce_output = total.to(group._orig_dtype)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, or the tensor itself; shares storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_slice(parameter: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(local shape, global offset per dimension) of this rank's part of a parameter."""
    if not isinstance(parameter, DTensor):
        return tuple(parameter.shape), (0,) * parameter.ndim
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    return tuple(shape), tuple(offset)


def sum_of_squares(tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Of all values of plain tensors, 0-dim; the sums of the tensors are added up in `dtype`."""
    return torch.stack(torch._foreach_norm(tensors)).to(dtype).square().sum()


def sum_over_shards(values: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """Sums in place over the ranks of a replica; mesh None: there is one."""
    # not mesh["shard"], which is a mesh made anew each time
    if mesh is not None and mesh.size(mesh.mesh_dim_names.index("shard")) > 1:
        torch.distributed.all_reduce(values, group=mesh.get_group("shard"))
    return values
