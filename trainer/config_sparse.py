"""The section `sparse` of a run's configuration."""

from typing import Literal

from pydantic import Field

from stepline.models.config import Section


class SparseConfig(Section):
    """2:4 sparse feed-forward layers and experts (S-STE, arXiv 2409.09099)."""

    mode: Literal["none", "s-ste"] = "none"
    """s-ste: soft-thresholded weights with a frozen scale, gradients straight through to the dense master weights."""
    forward: Literal["auto", "sparse", "dense"] = "auto"
    """The forward product, with precision.fp8: dense; sparse, by the sparse tensor cores, and refused where there are
    none; auto: sparse where the GPU can. A shape that is slower sparse on this machine stays dense, unless `force`."""
    force: bool = False
    """Sparse products also where they are slower."""
    grad_weight: Literal["dense", "mvue"] = "dense"
    """The weights' gradients: of the dense gradient of the result, or of its minimum-variance unbiased 2:4 estimate
    along tokens (arXiv 2203.10991)."""
    dense_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the steps, at the end, that train dense."""
