"""Between forward and backward no layer keeps a whole weight, or one made of it: FSDP2 frees what it gathered."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from stepline.comm.mesh import World, build_mesh
from stepline.models.sparse_linear import WEIGHTS
from stepline.trainer.run.start import start_job
from stepline.trainer.run.state import Trainee

SHAPE = ["model.hidden_size=32", "model.num_heads=2", "model.ffn_size=256", "model.num_layers=2"]
MOE = ["model.ffn=moe", "model.moe.experts=8", "model.moe.top_k=2"]
S_STE, FP8, ROWS = "sparse.mode=s-ste", "precision.fp8=true", "precision.fp8_scales=row"


def held_after_forward(config: str, options: list[str]) -> tuple[int, int]:
    """(Bytes that autograd holds in tensors of the feed-forward weights' shapes, bytes of those weights)."""
    world = World.from_environment()
    job = start_job(config, [*SHAPE, *options], "never", world)
    job.config.precision.compute = "fp32"
    trainee = Trainee.build(job.config, job.device, build_mesh(job.device, world.size, world.size))
    trainee.sparsity.begin(0, watched=False)
    tokens = torch.randint(0, 331, (1, 9), generator=torch.Generator().manual_seed(world.rank))
    named = trainee.model.named_parameters()
    whole = [p for name, p in named if name.removesuffix(".weight").endswith(WEIGHTS)]
    shapes = {tuple(p.shape) for p in whole} | {tuple(p.shape[1:]) for p in whole if p.ndim == 3}
    shapes |= {shape[::-1] for shape in shapes if len(shape) == 2}
    saved: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        trainee.model(tokens[:, :-1], tokens[:, 1:], loss_scale=torch.tensor(0.05))
    alive = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in saved
        if tuple(t.shape) in shapes
    }
    return sum(alive.values()), sum(p.numel() * p.element_size() for p in whole)


@pytest.mark.parametrize(
    "options",
    [[], [S_STE], [S_STE, "sparse.grad_weight=mvue"], [FP8], [S_STE, FP8], [FP8, ROWS],
     MOE, [*MOE, S_STE], [*MOE, FP8], [*MOE, S_STE, FP8], [*MOE, FP8, ROWS]],
    ids=lambda options: ",".join(o.split("=")[-1] for o in options) or "dense",
)  # fmt: skip
def test_no_weight_is_held(pool, tiny_config, options):
    for held, whole in pool.run(2, held_after_forward, str(tiny_config), options):
        assert whole == 2 * 3 * 32 * 256 * 4 * (8 if MOE[0] in options else 1)
        assert held == 0
