"""The synchroniser that a config asks for, over a built model."""

import functools
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from stepline.comm.chunking import PUBLISHED_KEPT
from stepline.comm.demo import DeMo, DeMoSettings
from stepline.comm.diloco import DiLoCo, DiLoCoSettings
from stepline.comm.random_k import RandomK, RandomKSettings
from stepline.comm.synchronizer import AllReduce, Synchronizer
from stepline.trainer.config import Config
from stepline.trainer.optim.build import Optimizer, build_optimizer, decay_groups
from stepline.trainer.optim.muon import Orthogonalizer
from stepline.trainer.run.precision import reduce_dtype


def build_synchronizer(
    config: Config, named: Mapping[str, nn.Parameter], mesh: DeviceMesh | None
) -> Synchronizer:
    """`parallel.sync` over the distinct trainable parameters of `named`, between the replicas of `mesh`.

    mesh: None for one rank alone.
    """
    parallel, weight_decay = config.parallel, config.optimizer.weight_decay
    several = mesh is not None and mesh["replicate"].size() > 1
    group = mesh["replicate"].get_group() if several else None
    parameters, decayed = decay_groups(dict(named))
    common = {"weight_decay": weight_decay}
    if parallel.sync == "all_reduce":
        optimizer = inner_optimizer(config, parameters)
        return AllReduce(parameters, group, optimizer, weight_decay, reduce_dtype(config))
    if parallel.sync == "diloco":
        settings = DiLoCoSettings(total_steps=config.total_steps(), **common, **parallel.diloco.model_dump())
        return DiLoCo(parameters, group, settings, inner_optimizer(config, parameters))
    vectors = {n: p for n, p in parameters.items() if p.ndim < 2}
    if parallel.sync == "random_k":
        random_k = parallel.random_k
        settings = RandomKSettings(
            density=random_k.density, beta=random_k.beta, bf16=random_k.codec == "bf16", seed=config.run.seed, **common
        )  # fmt: skip
        return RandomK(
            parameters, group, settings, decayed=decayed, dense=_adamw(config, vectors),
            make_optimizer=functools.partial(waiting_optimizer, config),
        )  # fmt: skip
    if parallel.demo.faithful:  # p (1 - lr wd) is of every parameter there
        decayed = set(parameters)
    demo = parallel.demo.model_dump() | {"chunk": parallel.demo.side, "ahead": parallel.demo.looks_ahead}
    if demo["faithful"]:
        world = 1 if mesh is None else mesh.size()
        demo |= {"codec": "fp32", "owner_reduce_above": world, "kept": demo["kept"] or PUBLISHED_KEPT}
    ends = {n for n, p in parameters.items() if p.ndim > 1 and n.split(".")[0] in ("embed", "head")}
    direction = None
    if demo["phi"] == "muon":
        matrices = {n: p for n, p in parameters.items() if n not in vectors and n not in ends}
        orthogonal = Orthogonalizer(matrices)

        def direction(momenta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return dict(orthogonal.updates(momenta.__getitem__))

    return DeMo(
        parameters, group, DeMoSettings(**demo, **common), decayed=decayed, untransformed=ends,
        dense=None if demo["faithful"] else _adamw(config, vectors),
        make_optimizer=functools.partial(waiting_optimizer, config), direction=direction,
        kernels=chunk_kernels(next(iter(parameters.values())).device),
    )  # fmt: skip


def chunk_kernels(device: torch.device) -> ModuleType | None:
    """What encodes and decodes DeMo's chunks in one pass over the values, where a device has that."""
    if device.type != "cuda":
        return None
    from stepline.kernels import triton_demo

    return triton_demo


def inner_optimizer(
    config: Config, parameters: dict[str, nn.Parameter], first_moment: bool = True
) -> Optimizer:
    """The optimizer of the config over `parameters`; first_moment: whether AdamW has one."""
    optimizer = config.optimizer
    return build_optimizer(
        parameters, name=optimizer.name, beta1=optimizer.beta1 if first_moment else None, beta2=optimizer.beta2,
        eps=optimizer.eps, momentum=optimizer.momentum,
    )  # fmt: skip


def waiting_optimizer(config: Config, parameters: dict[str, nn.Parameter]) -> Optimizer:
    """The same over updates that wait to be sent, without AdamW's first moment.

    An update waits about 1 / density steps, which is a mean already; a second one costs loss (docs/LAB.md).
    """
    return inner_optimizer(config, parameters, first_moment=False)


def _adamw(config: Config, parameters: dict[str, nn.Parameter]) -> Optimizer:
    optimizer = config.optimizer
    return build_optimizer(parameters, beta1=optimizer.beta1, beta2=optimizer.beta2, eps=optimizer.eps)
