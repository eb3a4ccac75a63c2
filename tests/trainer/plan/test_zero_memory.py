"""Memory behind DeepSpeed ZeRO by its own arithmetic (arXiv 1910.02054, figure 1): 2, 4 and 12 bytes a parameter."""

import pytest

from stepline.models.config import ModelConfig
from stepline.models.flops import parameter_counts
from stepline.trainer.config import Config
from stepline.trainer.plan.memory import Layout, estimate

MODEL = ModelConfig(vocab_size=32000, hidden_size=1024, num_layers=12, num_heads=16, ffn_size=4096)
N = parameter_counts(MODEL).total
WORLD = 8


def largest(stage: int, device: str = "cuda", compute: str = "bf16", **zero: str) -> dict[str, int]:
    parallel = {"backend": "zero", "shard": WORLD, "micro_batch": 1, "zero": {"stage": stage} | zero}
    config = Config(model=MODEL, parallel=parallel, precision={"compute": compute})
    config.run.device, config.run.compile = device, False
    return estimate(config, Layout(WORLD, WORLD, 1, 2)).largest


@pytest.mark.parametrize(
    ("stage", "weights", "optimizer"),
    [(2, 2 * N + 4 * N / WORLD, 8 * N / WORLD), (3, 2 * N / WORLD + 4 * N / WORLD, 8 * N / WORLD)],
)
def test_what_every_stage_cuts(stage, weights, optimizer):
    found = largest(stage)
    assert found["parameters"] == pytest.approx(weights, rel=1e-4)
    assert found["optimizer"] == pytest.approx(optimizer, rel=1e-4)


def test_gradients_stay_whole_in_stage_1_and_go_from_stage_2_on():
    """A bucket as large as this model takes them in stage 2, which keeps the rank's part; in stage 3 both stay."""
    one, two, three = (largest(stage, compute="fp32") for stage in (1, 2, 3))
    assert one["gradients"] == pytest.approx(4 * N + 4 * N / WORLD, rel=0.01)
    block_and_ends = 4 * (N - 11 * (N - 2 * 32000 * 1024 - 1024) / 12)
    assert two["gradients"] < 2 * 4 * N / WORLD + block_and_ends
    assert two["all-gather"] == pytest.approx(2 * 4 * N, rel=0.01)
    assert 2 * 4 * N / WORLD <= three["gradients"] < 2 * 4 * N / WORLD + block_and_ends


def test_what_is_offloaded_counts_on_cpus_alone():
    found = largest(3, offload="all")
    assert found["parameters"] == found["optimizer"] == 0
    assert largest(3, offload="optimizer")["parameters"] == pytest.approx(2 * N / WORLD, rel=1e-4)
    assert largest(3, device="cpu", offload="all") == largest(3, device="cpu")
