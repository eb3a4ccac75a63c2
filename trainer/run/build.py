"""The one place that joins models, comm and kernels, in one order:

model on meta -> sparse and FP8 layers -> recompute -> compile per block (or half) -> experts on the ep mesh -> shard
-> init -> beta -> optimizer -> synchroniser (synchronize.py) -> checkpoint load (state.py).

DeepSpeed fuses what comes after recompute: its order stands in comm/zero.py.
"""

import functools
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from stepline.comm.experts import expert_mesh, place_experts
from stepline.comm.fsdp import shard_model, sum_over_shards
from stepline.comm.pieces import parts
from stepline.models.init import init_parameter
from stepline.models.moe import MoE
from stepline.models.sparse_linear import Recipe, convert
from stepline.models.transformer import Transformer
from stepline.trainer.config import Config
from stepline.trainer.hf.adapters import check_adapters, freeze, load_frozen
from stepline.trainer.plan.resolve import whole_matrices
from stepline.trainer.run.precision import compute_dtype, master_dtype, reduce_dtype
from stepline.trainer.run.sparsity import set_betas
from stepline.trainer.run.step import all_sum


def build_model(
    config: Config, device: torch.device, mesh: DeviceMesh | None, *, initial: bool = True
) -> Transformer:
    """The initialised model, sharded over `mesh`; without a mesh (evaluation) it stays whole.

    Where DeepSpeed shards (run/zero.py), it stays on the meta device until then. initial: otherwise all parameters are
    NaN, for whoever loads every one of them: to draw those of 8 billion takes minutes.
    """
    compute = compute_dtype(config)
    with torch.device("meta"):
        model = Transformer(config.model).to(master_dtype(config))
    convert(model, *recipes(config))
    if config.optimizer.only == "adapters":
        check_adapters(config)
        freeze(model)
    for block in model.layers:
        _recompute(block, config.run.recompute)
        if config.run.compile is True:
            _compile(block, config)
    replicate = config.parallel.sync == "all_reduce"  # otherwise the replicas are the synchroniser's
    mixtures = [m for m in model.modules() if isinstance(m, MoE)]
    for mixture in mixtures if mesh is not None and mesh.size() > 1 else ():
        # over a slow link no layer of a micro-batch waits
        mixture.sum_ranks = all_sum if replicate else functools.partial(sum_over_shards, mesh=mesh)
    if mesh is not None and config.parallel.backend == "zero":
        return model
    experts, cut = [m.experts for m in mixtures], None
    if config.parallel.experts > 1 and mesh is not None:
        cut = expert_mesh(mesh, config.parallel.experts)
        for module in experts:
            place_experts(module, cut)
    if mesh is not None and (
        (mesh if replicate else mesh["shard"]).size() > 1 or compute != master_dtype(config)
    ):
        shard_model(
            model,
            model.layers,
            mesh,
            compute_dtype=compute,
            reduce_dtype=reduce_dtype(config),
            replicate=replicate,
            reshard_after_forward=config.parallel.reshard_after_forward,
            experts=experts if cut is not None else (),
            expert_mesh=cut,
            keep_matrices=whole_matrices(config),
        )
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
    if not initial:
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        return model
    initialise(dict(model.named_parameters()), config)
    if config.optimizer.only == "adapters":
        load_frozen(model, config)
    set_betas(model)
    return model


def recipes(config: Config) -> tuple[Recipe, Recipe]:
    """How the linear layers of feed-forward layers, and those of attention, make their products."""
    fp8, sparse = config.precision.fp8, config.sparse.mode == "s-ste"
    rows = fp8 and config.precision.fp8_scales == "row"
    mvue = sparse and config.sparse.grad_weight == "mvue"
    return Recipe(sparse, mvue, fp8, rows), Recipe(fp8=fp8, row_scales=rows)


@torch.no_grad()
def initialise(parameters: Mapping[str, torch.Tensor], config: Config) -> None:
    """Each value is a function of seed, parameter name and global index: the same for every layout of ranks."""
    for name, parameter in parameters.items():
        for part, offset in parts(parameter):
            values = init_parameter(
                name,
                tuple(parameter.shape),
                config.model,
                seed=config.run.seed,
                offset=offset,
                shape=tuple(part.shape),
                device=part.device,
                dtype=part.dtype,
            )
            part.copy_(values)


def _compile(block: nn.Module, config: Config) -> None:
    """The forward alone: FSDP's hooks, which surround it, stay outside of the compiled graph.

    A reversible block runs its halves twice, by hooks that no graph holds: each is compiled by itself. How many tokens
    an expert gets is known only as it runs: a mixture is not compiled.
    """
    dense, standard = config.model.ffn == "dense", config.model.blocks == "standard"
    modules = [block] if dense and standard else [block.attn, block.ffn] if dense else [block.attn]
    for module in modules:
        module.forward = torch.compile(module.forward)


def _recompute(block: nn.Module, mode: str) -> None:
    """Activation recompute inside the block's hooks, so that FSDP has gathered its parameters when it runs."""
    if mode == "none":
        return
    context = {}
    if mode == "selective":
        context["context_fn"] = _keep_products_alone
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **context)


def _keep_products_alone() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The modes of the forward and of its repetition."""
    keeping, giving = create_selective_checkpoint_contexts(_keep_products)
    return keeping, _Repetition(giving)


class _Repetition(TorchDispatchMode):
    """Takes what was kept from `kept` and runs the rest as it comes: FSDP's hooks around dealt experts, which lie
    inside of the block, run other operators than in the forward, and torch's own mode counts on the same ones."""

    def __init__(self, kept: TorchDispatchMode) -> None:
        super().__init__()
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if _keep_products(None, operation) is CheckpointPolicy.MUST_SAVE:
            return self.kept.__torch_dispatch__(operation, types, args, kwargs)
        return operation(*args, **(kwargs or {}))


def _keep_products(
    _context: object, operation: object, *_args: object, **_kwargs: object
) -> CheckpointPolicy:
    """Selective recompute keeps what is dear to compute (products, attention) and repeats the rest."""
    dear = {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._grouped_mm.default,
        torch.ops.aten._scaled_mm.default,
        torch.ops.stepline.sparse_mm.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
    return CheckpointPolicy.MUST_SAVE if operation in dear else CheckpointPolicy.PREFER_RECOMPUTE
