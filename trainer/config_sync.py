"""The part of the configuration that says how replicas agree (`parallel.sync` other than all_reduce)."""

from typing import Literal

from pydantic import Field, model_validator

from stepline.models.config import Section


class DeMoConfig(Section):
    """DeMo (arXiv 2411.19870): the replicas exchange the largest DCT coefficients of their momentum."""

    accumulate: Literal["updates", "gradients"] = "updates"
    """What waits to be sent: updates of the config's optimizer, which are applied as they arrive; or gradients, as
    published, whose decoded momentum becomes an update by phi."""
    version: Literal[1, 2] = 1
    """Of gradients. 1: as published, the learning rate inside the momentum; 2: a mean of gradients, of which alpha of
    what was sent is taken out."""
    density: float = Field(1 / 50, gt=0, le=1)
    """Share of the coefficients that travel."""
    chunk: int | None = Field(None, ge=2, le=1024)
    """Largest side of the chunks that are transformed; every rank holds two chunk x chunk matrices. Default: 32, and
    the published 64 where faithful."""
    kept: int | None = Field(None, ge=1)
    """Coefficients of each chunk that travel, instead of the density."""
    beta: float = Field(0.999, ge=0, lt=1)
    """Decay of the momentum that waits."""
    alpha: float = Field(0.2, ge=0, le=1)
    """Version 2: share of what was sent that leaves the momentum."""
    phi: Literal["sign", "identity", "muon"] = "sign"
    """Of gradients: what makes an update of the decoded momentum."""
    codec: Literal["fp32", "int8", "sign"] = "sign"
    """How values travel: as they are; a byte and a scale for each chunk; their sign and a scale for each chunk."""
    delay: Literal[0, 1] = 0
    """1: updates are applied a step late (the first step applies none), so that the exchange overlaps the next forward
    and backward."""
    ahead: bool = True
    """With delay 1, of updates: gradients are taken where the parameters are about to be as far as a replica knows: its
    own update stands in for the mean under way. This takes a copy of the parameters and saves most of the loss that a
    delay costs (measured with two replicas)."""
    owner_reduce_above: int = Field(8, ge=1)
    """Replicas beyond which each reduces a share of the chunks and sends the largest of the sum: what a rank receives
    then no longer grows with the replicas."""
    faithful: bool = False
    """The published algorithm, on gradients: chunks by the largest divisor, vectors and embeddings transformed and
    decayed too, `kept` (32) coefficients of each chunk as they are. `version`, `phi` and `delay` are as set, and so is
    the weight decay, which is 0 as published."""

    @property
    def side(self) -> int:
        """Largest side of a chunk."""
        return self.chunk or (64 if self.faithful else 32)

    @property
    def looks_ahead(self) -> bool:
        """Whether the parameters between two steps are each replica's own."""
        return bool(self.delay and self.ahead) and self.accumulate == "updates" and not self.faithful

    @model_validator(mode="after")
    def _published(self) -> "DeMoConfig":
        fields = type(self).model_fields
        asked = [k for k in ("version", "phi", "alpha") if getattr(self, k) != fields[k].default]
        if asked and self.accumulate == "updates" and not self.faithful:
            raise ValueError(
                f"{asked[0]} is of accumulated gradients: set accumulate to gradients, or leave it out"
            )
        changed = [
            k for k in ("density", "codec", "owner_reduce_above") if getattr(self, k) != fields[k].default
        ]
        changed += ["phi"] if self.phi == "muon" else []
        if self.faithful and changed:
            raise ValueError(
                f"{changed[0]} is not part of the published algorithm; leave it out or set faithful to false"
            )
        return self


class DiLoCoConfig(Section):
    """DiLoCo (arXiv 2311.08105): replicas train alone and average how far they came. The loss jumps at an outer step,
    where the guard's history begins anew: of a turn of every / fragments steps it judges the second half, of one below
    32 steps what is behind half of optimizer.guard.window, and NaN always."""

    every: int = Field(32, ge=1)
    """Steps between two averages of a parameter. After the run's last step what is not in its turn takes the plain mean
    of the replicas."""
    outer_lr: float = Field(0.7, gt=0, le=10)
    """Learning rate of the outer step."""
    outer_momentum: float = Field(0.9, ge=0, lt=1)
    """Nesterov momentum of the outer step."""
    fragments: int = Field(1, ge=1)
    """Parts of the model that are averaged in turns (arXiv 2501.18512), every / fragments steps apart."""
    codec: Literal["fp32", "bf16", "int8"] = "fp32"
    """How the averaged distances travel."""

    @model_validator(mode="after")
    def _turns(self) -> "DiLoCoConfig":
        if self.fragments > self.every:
            raise ValueError(
                f"fragments {self.fragments} cannot take turns within {self.every} steps (every); lower it"
            )
        return self


class RandomKConfig(Section):
    """Random-k: all replicas send the same random values of the updates that wait."""

    density: float = Field(1 / 32, ge=1e-9, le=1)
    """Share of the values that travel: one of so many, a whole number."""
    beta: float = Field(0.999, ge=0, lt=1)
    """Decay of the updates that wait."""
    codec: Literal["fp32", "bf16"] = "bf16"
    """How values travel."""
