"""How DeMo works; its equations: comm/demo.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DeMoSettings:
    """The defaults are those of the config, which looks ahead where that can be."""

    accumulate: str = "updates"
    """What waits to be sent: `updates` of the optimizer, or `gradients` as published."""
    version: int = 1
    faithful: bool = False
    """The published algorithm: divisor chunks, every parameter transformed."""
    chunk: int = 32
    density: float = 1 / 50
    kept: int | None = None
    """Coefficients of a chunk, instead of the density."""
    beta: float = 0.999
    alpha: float = 1.0
    """Version 2: how much of what was sent leaves the momentum."""
    phi: str = "sign"
    codec: str = "sign"
    delay: int = 0
    """Steps by which the update lags, so that the exchange overlaps the next forward and backward."""
    ahead: bool = False
    """A step late, of updates: gradients are taken with this replica's update in the place of the mean under way."""
    owner_reduce_above: int = 8
    """Replicas beyond which owners reduce, so that what a rank receives no longer grows."""
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.ahead and (not self.delay or self.accumulate != "updates" or self.faithful):
            raise ValueError("only updates that are a step late can be looked ahead to")
