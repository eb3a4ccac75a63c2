"""What was measured of the ways in which replicas agree: the time to make and read packets, and the loss. No torch."""

from stepline.trainer.config_sync import DeMoConfig

CODEC_CPU_S = 44.2e-3 / 3_443_520
"""Seconds a parameter in which one thread of a CPU encodes and decodes DeMo's packets (benchmarks/RESULTS.md: 31.6 and
12.6 ms for 3.4M parameters, 28.1 and 11.2 on an idle machine). Not measured on GPUs."""
DECODE_CPU_S = 12.6e-3 / 3_443_520
"""Of these, one decoding; a replica that looks ahead decodes what it has sent, too."""
DEMO_LOSS = {
    ("sign", 1 / 50, 32): 0.46,
    ("sign", 1 / 100, 32): 1.58,
    ("sign", 1 / 400, 32): 5.34,
    ("int8", 1 / 128, 32): 1.09,
    ("int8", 1 / 128, 64): 1.2,
}
"""By codec, density and chunk: loss above all-reduce's in % (benchmarks/RESULTS.md: AdamW, two replicas of 1.4M
parameters, each at its own learning rate; int8 and 1/400: single runs). Of DiLoCo and random-k only settings that are
not the defaults were measured (int8, every 50 steps: 8.14 %; 1/100: 23.3 %)."""
LATE_LOSS = {("sign", 1 / 50, 32, True): 1.34, ("sign", 1 / 50, 32, False): 10.85}
"""The same a step late, by codec, density, chunk and whether replicas look ahead (if not: a single run)."""
MEASURED = "with 2 replicas of 1.4M parameters and AdamW (benchmarks/RESULTS.md)"
"""On what."""


def demo_loss(setting: DeMoConfig) -> float | None:
    """Loss of DeMo above all-reduce's in %, as measured with all replicas' packets gathered."""
    varied = {"codec", "density", "chunk", "owner_reduce_above", "delay", "ahead"}
    if setting.model_dump(exclude=varied) != DeMoConfig().model_dump(exclude=varied):
        return None
    key = setting.codec, setting.density, setting.side
    return LATE_LOSS.get((*key, setting.ahead)) if setting.delay else DEMO_LOSS.get(key)
