"""What a run takes in GPU-hours and hours, how many GPUs still help, and what time costs in compute."""

import math
from dataclasses import dataclass

from stepline.trainer.errors import UserError
from stepline.trainer.plan.laws import POWER_LINES
from stepline.trainer.watch.peaks import peak_flops, plain_names

ASSUMED_MFU = 0.4
"""Model FLOP utilisation where none was measured: what well-tuned dense runs reach."""

WHOLE_MODEL = "the model's, with head and causal attention"
"""FLOPs of a config, as the MFU of a run counts them (models/flops.py)."""
WEIGHTS_ALONE = "without head and attention, which add most to small models; a config counts them"


@dataclass(frozen=True)
class Hardware:
    """What the run's time is computed from."""

    device: str
    peak: float
    """Dense bf16 FLOP/s of one GPU."""
    mfu: float
    measured: bool
    """Whether `mfu` was given by the user, or assumed."""
    gpus: int | None = None


@dataclass(frozen=True)
class Cost:
    """Of the planned run."""

    flops: float
    """Model FLOPs of the whole run."""
    gpu_hours: float
    hours: float | None
    """Wall-clock time on `gpus`; None when their number is not known."""
    max_useful_gpus: int | None
    """GPUs that B_crit feeds with one window each, where a share more of them takes as much of it off the time as it
    adds to the cost; None without a sequence length."""
    counted: str = WHOLE_MODEL
    """What `flops` are, in words."""


@dataclass(frozen=True)
class Tradeoff:
    """One row of the iso-loss table: another batch that reaches the planned run's loss."""

    batch_tokens: float
    steps: int
    tokens: float
    gpu_hours: float | None
    hours: float | None
    """When the number of GPUs grows with the batch, each keeping its share of a step."""


def hardware(device: str, mfu: float | None, gpus: int | None) -> Hardware:
    """A device by its name (`H100 80GB HBM3`, or a plain one such as `H100 NVL`, `b200`); raises UserError."""
    peak = peak_flops(device)
    if peak is None:
        if kinds := [name for name in plain_names() if name.lower().startswith(f"{device.lower()} ")]:
            raise UserError(f"the peaks of the kinds of {device} differ; give one of {', '.join(kinds)}")
        raise UserError(
            f"the peak of device '{device}' is not known; give --peak-flops, or one of {known_devices()}"
        )
    return Hardware(device, peak, *checked_mfu(mfu), gpus)


def asked_hardware(
    device: str | None, peak: float | None, mfu: float | None, gpus: int | None
) -> Hardware | None:
    """What --device or --peak-flops and --mfu name; None when they name nothing. Raises UserError."""
    if device is not None and peak is not None:
        raise UserError("give --device or --peak-flops, not both")
    if peak is not None:
        if not 1e9 <= peak <= 1e18:
            raise UserError(f"--peak-flops is {peak:g}; it must be between 1e9 and 1e18 FLOP/s")
        return Hardware("the given device", peak, *checked_mfu(mfu), gpus)
    if device is not None:
        return hardware(device, mfu, gpus)
    if mfu is not None:
        raise UserError("--mfu needs --device or --peak-flops")
    return None


def checked_mfu(mfu: float | None) -> tuple[float, bool]:
    """(MFU, whether it was measured)."""
    if mfu is None:
        return ASSUMED_MFU, False
    if not 0 < mfu <= 1:
        raise UserError(f"mfu is {mfu:g}; it is a fraction above 0 and at most 1")
    return mfu, True


def known_devices() -> str:
    """The plain names of all devices whose peak is known."""
    return ", ".join(plain_names())


def run_cost(
    tokens: float,
    flops_per_token: float,
    machine: Hardware,
    critical: float,
    seq_len: int | None,
    counted: str = WHOLE_MODEL,
) -> Cost:
    """FLOPs, GPU-hours and hours of `tokens`; critical: B_crit(D_min) in tokens; counted: what the FLOPs are."""
    flops = tokens * flops_per_token
    gpu_hours = flops / (machine.peak * machine.mfu) / 3600
    useful = None if seq_len is None else max(1, int(critical // seq_len))
    hours = None if machine.gpus is None else gpu_hours / machine.gpus
    return Cost(flops, gpu_hours, hours, useful, counted)


def iso_loss(tokens: float, batch_tokens: float, cost: Cost | None) -> list[Tradeoff]:
    """Batches from a quarter to 16 times the planned one that reach the same loss: D = D_min (1 + B / B_crit).

    Power Lines (arXiv 2505.13738); D_min is that of the planned run. Compute grows with D, time falls with
    the number of steps when GPUs are added with the batch.
    """
    least = POWER_LINES.min_tokens(tokens, batch_tokens)
    rows = []
    for factor in (0.25, 0.5, 1, 2, 4, 8, 16):
        batch = batch_tokens * factor
        # Not by way of `least` for the plan itself, whose steps a rounding error would make one more.
        needed = tokens if factor == 1 else POWER_LINES.tokens_for(least, batch)
        ratio = needed / tokens
        gpu_hours = None if cost is None else cost.gpu_hours * ratio
        hours = None if cost is None or cost.hours is None else cost.hours * ratio / factor
        rows.append(Tradeoff(batch, math.ceil(needed / batch), needed, gpu_hours, hours))
    return rows
