"""bf16 compute under FSDP2 is the plain model in bf16: nothing but the parameters is cast."""

import pytest
import torch

from stepline.comm.mesh import World, build_mesh
from stepline.trainer.run.build import build_model
from stepline.trainer.run.start import start_job

MOE = ["model.ffn=moe", "model.hidden_size=48", "model.ffn_size=24"]
REVFFN = ["model.blocks=revffn", "model.hidden_size=48"]


def forwards(config: str, overrides: list[str]) -> tuple[torch.Tensor, torch.Tensor, list[torch.dtype]]:
    """Logits under FSDP2 in bf16, those of the plain model in bf16, and what a block was handed."""
    job = start_job(config, ["precision.compute=bf16", *overrides], "never", World.from_environment())
    mesh = build_mesh(job.device, job.world.size, job.world.size)
    sharded = build_model(job.config, job.device, mesh)
    plain = build_model(job.config, job.device, None)
    for parameter in plain.parameters():  # buffers stay in fp32, as they do under FSDP2
        parameter.data = parameter.data.bfloat16()
    seen = []
    sharded.layers[1].register_forward_pre_hook(
        lambda _, args: seen.extend(a.dtype for a in args if torch.is_tensor(a))
    )
    tokens = torch.arange(64).view(2, 32) * 5 % 331
    with torch.no_grad():
        return sharded(tokens), plain(tokens), seen


@pytest.mark.parametrize("overrides", [[], MOE, REVFFN, [*MOE, *REVFFN]])
def test_rotary_tables_stay_in_fp32_and_logits_are_the_plain_models(pool, tiny_config, overrides):
    for sharded, plain, seen in pool.run(2, forwards, str(tiny_config), overrides):
        if "model.blocks=revffn" in overrides:
            assert seen == [torch.float32] * 4  # the streams, cosines, sines
        else:
            assert seen == [torch.bfloat16, torch.float32, torch.float32]  # hidden states, cosines, sines
        assert sharded.dtype == torch.bfloat16
        assert torch.equal(sharded, plain)
