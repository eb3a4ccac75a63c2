"""Sums over micro-batches and replicas, in bf16 between ranks, against float64."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from stepline.comm.fsdp import all_reduce_on_last, local, shard_model
from stepline.comm.mesh import build_mesh

ROWS, WIDTH = 64, 48


def inputs(rank: int, micro_batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + micro_batch)
    return torch.randn(ROWS, WIDTH, generator=generator) + 0.5


def summed(pieces: int, shard: int) -> float:
    """Relative error of the gradient of sum(w x) over ranks and micro-batches, on two replicas."""
    world = dist.get_world_size()
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    shard_model(
        model, [], build_mesh(torch.device("cpu"), world, shard), compute_dtype=torch.float32,
        reduce_dtype=torch.bfloat16, reshard_after_forward=False,
    )  # fmt: skip
    for i in range(pieces):
        all_reduce_on_last(model, i == pieces - 1)
        model(inputs(dist.get_rank(), i)).sum().backward()
    (gradient,) = (p.grad for p in model.parameters())
    assert gradient.dtype == torch.float32
    exact = sum(inputs(r, i).double().sum(0) for r in range(world) for i in range(pieces))
    rows = len(local(gradient))
    return float((local(gradient).double() - exact).norm() / exact.expand(rows, WIDTH).norm())


@pytest.mark.parametrize(("world", "shard"), [(2, 1), (4, 2)])
def test_accumulation_in_bf16_rounds_once(pool, world, shard):
    """Those of one micro-batch are off by .0023; a sum that stayed in bf16 would be off by .0052 after 64."""
    once, often = (max(pool.run(world, summed, pieces, shard)) for pieces in (1, 64))
    assert 5e-4 < once < 4e-3
    assert often < 1.5 * once
