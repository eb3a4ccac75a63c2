"""bf16 compute under FSDP2 is the plain model in bf16: nothing but the parameters is cast."""

import torch

from stepline.comm.mesh import World, build_mesh
from stepline.trainer.run.build import build_model
from stepline.trainer.run.start import start_job


def forwards(config: str) -> tuple[torch.Tensor, torch.Tensor, list[torch.dtype]]:
    """Logits under FSDP2 in bf16, those of the plain model in bf16, and what a block was handed."""
    job = start_job(config, ["precision.compute=bf16"], "never", World.from_environment())
    mesh = build_mesh(job.device, job.world.size, job.world.size)
    sharded = build_model(job.config, job.device, mesh)
    plain = build_model(job.config, job.device, None).bfloat16()
    seen = []
    sharded.layers[1].register_forward_pre_hook(lambda _, args: seen.extend(a.dtype for a in args[:3]))
    tokens = torch.arange(64).view(2, 32) * 5 % 331
    with torch.no_grad():
        return sharded(tokens), plain(tokens), seen


def test_rotary_tables_stay_in_fp32_and_logits_are_the_plain_models(pool, tiny_config):
    for sharded, plain, seen in pool.run(2, forwards, str(tiny_config)):
        assert seen == [torch.bfloat16, torch.float32, torch.float32]  # hidden states, cosines, sines
        assert sharded.dtype == torch.bfloat16
        assert torch.equal(sharded, plain)
