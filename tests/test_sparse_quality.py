"""benchmarks/sparse_quality.py: another threshold reaches all that makes, counts and evaluates sparse weights."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = """
import sparse_quality

sparse_quality.replace_threshold()
import torch
from stepline.kernels import ops
from stepline.kernels.fp8 import E4M3
from stepline.models.sparse_linear import Mode, Recipe, SparseExperts, SparseLinear
from stepline.trainer.run import generate, sparsity
from stepline.trainer.hf import export

weight = torch.tensor([[1.0, -2.0, 3.0, -4.0, 0.5, 8.0, -0.25, 0.125]]).repeat(8, 1)
kept = torch.tensor([[0.0, 0.0, 3.0, -4.0, 0.5, 8.0, 0.0, 0.0]]).repeat(8, 1)
layer = SparseLinear(8, 8, Recipe(sparse=True), Mode())
with torch.no_grad():
    layer.weight.copy_(weight)
    layer.beta.fill_(sparsity.scale_of(sparsity.scale_sums(weight)))
    assert torch.equal(layer(torch.eye(8)).T, kept), layer(torch.eye(8)).T
    assert torch.equal(layer.effective_weight(), kept)
    experts = SparseExperts(1, 8, 8, Recipe(sparse=True), Mode())
    for name in ("w1", "w3", "w2"):
        getattr(experts, name).copy_(weight.reshape(getattr(experts, name).shape))
        getattr(experts, name + "_beta").fill_(1)
    x = torch.eye(8)
    made = experts.product(x, (experts.w1, experts.w3, experts.w2), torch.tensor([8]))
    torch.testing.assert_close(made, (torch.nn.functional.silu(kept.T) * kept.T) @ kept.T)
assert torch.equal(ops.weight_cast(weight, torch.tensor(1.0), E4M3, weight.dtype, True).float(), kept)
for module in (sparsity, export):
    assert torch.equal(module.soft_threshold(weight), kept), module
assert torch.equal(generate.sparse_weight(weight, torch.tensor(1.0)), kept)
"""


def test_the_hard_threshold_takes_the_place_of_the_soft_one_everywhere():
    """In a process of its own, as the benchmark's ranks are: two of four as they are, and beta 1."""
    env = os.environ | {"PYTHONPATH": f"{ROOT / 'benchmarks'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", LAYERS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
