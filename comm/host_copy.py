"""From the host's memory to a device's."""

import torch
from torch import Tensor


def to_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """The tensor on the device, copied beside the computation; None of None."""
    if tensor is not None and device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy from other memory waits for all that the device has to do
    return None if tensor is None else tensor.to(device, non_blocking=True)
