"""The trainer's step on CUDA against the same step on the CPU."""

import os

import pytest
import torch

from stepline.comm.mesh import World, build_mesh, start_process_group
from stepline.kernels.cross_entropy import linear_cross_entropy
from stepline.models.config import ModelConfig
from stepline.models.init import init_parameter
from stepline.trainer.config import Config
from stepline.trainer.data.loader import Batch
from stepline.trainer.run.state import Trainee
from stepline.trainer.run.step import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# torch looks for it once, at a process's first product
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.mark.parametrize("z_weight", [0.0, 1e-3])
def test_chunked_cross_entropy_equals_whole_logits(z_weight):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(777, 64, generator=draw, dtype=torch.float64)
    weight = torch.randn(1000, 64, generator=draw, dtype=torch.float64) / 8
    targets = torch.randint(0, 1000, (777,), generator=draw)
    targets[::7] = -100
    h, w = (t.clone().requires_grad_() for t in (hidden, weight))
    logits = h @ w.T
    z = torch.where(targets != -100, logits.logsumexp(-1).square(), 0).sum()
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (nll + z_weight * z).backward()
    whole = [nll.item(), z.item(), h.grad, w.grad]
    h, w = (t.cuda().requires_grad_() for t in (hidden, weight))
    sums = linear_cross_entropy(h, w, targets.cuda(), z_weight, chunk=256)
    (sums.nll + z_weight * sums.z).backward()
    for cpu, cuda in zip(whole, [sums.nll.item(), sums.z.item(), h.grad.cpu(), w.grad.cpu()], strict=True):
        torch.testing.assert_close(torch.as_tensor(cuda), torch.as_tensor(cpu), rtol=1e-9, atol=1e-9)


def test_initial_weights_are_those_of_the_cpu():
    config = ModelConfig(vocab_size=100, hidden_size=64, num_layers=2, num_heads=4, ffn_size=96)
    for name in ("embed.weight", "layers.0.ffn.w2.weight"):
        cpu, cuda = (init_parameter(name, (333, 77), config, seed=3, device=d) for d in ("cpu", "cuda"))
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-6, atol=1e-9)


def losses(device: torch.device, compute: str, compiled: bool = False, canon: str = "none") -> list[float]:
    """30 steps of the trainer with Muon on one batch of a tiny model."""
    shape = {"vocab_size": 256, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_size": 128}
    config = Config(model=ModelConfig(**shape, canon=canon))
    config.precision.compute, config.run.compile = compute, compiled
    config.optimizer.name, config.optimizer.weight_decay = "muon", 0.1
    tokens = torch.randint(0, 256, (2, 4, 65), generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), None, {})
    start_process_group(World(0, 1, 0, 1), device, 60)
    state = Trainee.build(config, device, build_mesh(device, 1, 1))
    curve = [train_step(state, batch, 3e-3).loss.item() for _ in range(30)]
    torch.distributed.destroy_process_group()
    return curve


@pytest.mark.parametrize("canon", ["none", "AC"])
@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_training_follows_fp32(compiled, canon):
    """bf16 compute with fp32 master weights stays within 5 % of fp32 on the CPU."""
    cpu = losses(torch.device("cpu"), "fp32", canon=canon)
    cuda = losses(torch.device("cuda", 0), "bf16", compiled, canon)
    assert cpu[-1] < cpu[0] - 0.5
    assert torch.tensor(cuda) == pytest.approx(torch.tensor(cpu), rel=0.05)


def test_deterministic_training_repeats_its_bits():
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (losses(torch.device("cuda", 0), "bf16") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first == second
