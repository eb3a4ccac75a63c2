"""What was measured of the ways in which replicas agree: the time to make and read packets, and the loss. No torch."""

from stepline.trainer.config_sync import DeMoConfig

CODEC_CPU_S = 44.2e-3 / 3_443_520
"""Seconds a parameter in which one thread of a CPU encodes and decodes DeMo's packets (benchmarks/RESULTS.md: 31.6 and
12.6 ms for 3.4M parameters, 28.1 and 11.2 on an idle machine). Not measured on GPUs."""
DEMO_LOSS = {
    ("sign", 1 / 50, 32): 0.46,
    ("sign", 1 / 100, 32): 1.58,
    ("int8", 1 / 128, 32): 1.09,
    ("int8", 1 / 128, 64): 1.2,
}
"""By codec, density and chunk: loss above all-reduce's in % (benchmarks/RESULTS.md: AdamW, two replicas of 1.4M
parameters, each at its own learning rate; int8: single runs). Of DiLoCo one setting that is not its default (int8,
every 50 steps: 8.14 % in 300 steps, one seed); nothing else that loses anything was measured so."""
MEASURED = "with 2 replicas of 1.4M parameters and AdamW (benchmarks/RESULTS.md)"
"""On what."""


def demo_loss(setting: DeMoConfig) -> float | None:
    """Loss of DeMo above all-reduce's in %, as measured with all replicas' packets gathered."""
    varied = {"codec", "density", "chunk", "owner_reduce_above"}
    if setting.model_dump(exclude=varied) != DeMoConfig().model_dump(exclude=varied):
        return None
    return DEMO_LOSS.get((setting.codec, setting.density, setting.side))
