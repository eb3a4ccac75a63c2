"""The types of numbers in a run."""

import torch

from stepline.trainer.config import Config

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def compute_dtype(config: Config) -> torch.dtype:
    """Type of activations and of gathered parameters, of a resolved config."""
    return COMPUTE_DTYPES[config.precision.compute]


def master_dtype(config: Config) -> torch.dtype:
    """Type of parameters, gradients and optimizer state."""
    return torch.float64 if config.precision.compute == "fp64" else torch.float32


def reduce_dtype(config: Config) -> torch.dtype:
    """Type in which gradients are summed over ranks."""
    return torch.bfloat16 if config.precision.reduce == "bf16" else master_dtype(config)
