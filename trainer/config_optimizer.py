"""The sections `optimizer` and `schedule` of a run's configuration."""

from typing import Annotated, Literal

from pydantic import Field

from stepline.models.config import Section
from stepline.trainer.config_types import Auto, Count


class GuardConfig(Section):
    """When a step is skipped, alike on all ranks, and when the run stops."""

    sigma: float = Field(6.0, gt=0, allow_inf_nan=True)
    """Skip a step whose loss or gradient norm is this many standard deviations above the recent mean."""
    window: int = Field(128, ge=8, le=65536)
    """Accepted steps that make the recent mean."""
    max_skipped: int = Field(10, ge=1)
    """Stop the run after this many skipped steps in a row; looked at every so many steps and with each row."""


class OptimizerConfig(Section):
    """The update."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon for the blocks' matrices with AdamW for the rest (arXiv 2502.16982)."""
    only: Literal["all", "adapters"] = "all"
    """What is trained: all, or of pre-trained layers in reversible blocks the adapters and the streams' norms alone;
    run.init_from then names the checkpoint of the rest."""
    lr: Auto | Annotated[float, Field(gt=0, le=10)] = "auto"
    """Peak learning rate; auto: by the scaling law."""
    weight_decay: Auto | Annotated[float, Field(ge=0, le=10)] = "auto"
    """Decoupled weight decay of the matrices (norms and embeddings have none); auto: by the scaling law."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's first moment; of what waits to be sent (parallel.sync demo and random_k) there is none."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's second moment."""
    eps: float = Field(1e-8, gt=0, lt=1)
    """AdamW's epsilon."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Muon's momentum (Nesterov)."""
    grad_clip: float = Field(1.0, gt=0, allow_inf_nan=True)
    """Largest global gradient norm."""
    guard: GuardConfig = GuardConfig()
    """NaN and spike guard."""


class ScheduleConfig(Section):
    """The learning rate over the run."""

    name: Literal["linear", "cosine", "wsd"] = "linear"
    """Decay after warm-up: linear, cosine, or stable then linear (wsd)."""
    warmup_steps: Auto | Annotated[Count, Field(ge=0)] = "auto"
    """Linear warm-up; auto: 10 % of the steps, at most 2000."""
    final_fraction: float = Field(0.0, ge=0, le=1)
    """Last learning rate as a fraction of the peak."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """wsd: share of the steps at the end in which the learning rate decays."""
