"""DeepSpeed ZeRO on one CUDA device against FSDP2 there: bf16, offload into host memory, weights in int8.

NOT YET RUN ON A GPU.
"""

import functools
import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CODE = """
import json, sys, torch
from stepline.comm.mesh import World, build_mesh, start_process_group
from stepline.models.config import ModelConfig
from stepline.trainer.config import Config
from stepline.trainer.data.loader import Batch
from stepline.trainer.run.state import Trainee
from stepline.trainer.run.step import train_step

given = json.loads(sys.argv[1])
shape = {"vocab_size": 256, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_size": 128}
config = Config(model=ModelConfig(**shape), parallel=given["parallel"], precision={"compute": given["compute"]})
config.run.compile, config.optimizer.weight_decay = False, 0.1
tokens = torch.randint(0, 256, (2, 4, 65), generator=torch.Generator().manual_seed(0))
batch = Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous(), None, {})
device = torch.device("cuda", 0)
start_process_group(World(0, 1, 0, 1), device, 60)
state = Trainee.build(config, device, build_mesh(device, 1, 1))
print(json.dumps([train_step(state, batch, 3e-3).loss.item() for _ in range(30)]))
"""


@functools.cache
def fsdp(compute: str) -> torch.Tensor:
    """The curve that the others are compared with."""
    return losses(compute)


def losses(compute: str, **parallel) -> torch.Tensor:
    """30 steps on one batch of a tiny model, in a process of its own, as DeepSpeed's state is one of the process."""
    given = json.dumps({"compute": compute, "parallel": parallel})
    done = subprocess.run([sys.executable, "-c", CODE, given], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]), dtype=torch.float64)


@pytest.mark.parametrize(
    ("compute", "zero", "deepspeed", "tolerance"),
    [
        ("fp32", {"stage": 1}, {}, 1e-4),
        ("fp32", {"stage": 3}, {"stage3_param_persistence_threshold": 0}, 1e-4),
        ("bf16", {"stage": 2}, {}, 1e-2),
        ("bf16", {"stage": 2, "offload": "optimizer"}, {}, 1e-2),
        ("bf16", {"stage": 3, "offload": "all"}, {"stage3_param_persistence_threshold": 0}, 1e-2),
        ("bf16", {"stage": 3}, {"zero_quantized_weights": True}, 5e-2),
    ],
)
def test_the_curve_is_that_of_fsdp2(unavailable, compute, zero, deepspeed, tolerance):
    if "zero_quantized_weights" in deepspeed and shutil.which("nvcc") is None:
        unavailable("DeepSpeed compiles its quantiser with nvcc, and this machine has none")
    if importlib.util.find_spec("deepspeed") is None:
        unavailable("DeepSpeed is not installed")
    expected = fsdp(compute)
    found = losses(compute, backend="zero", zero=zero, deepspeed=deepspeed)
    assert expected[-1] < expected[0] - 0.5
    assert (found / expected - 1).abs().max() < tolerance
